"""What a run does about losses and gradients that are not finite, full disks and memory that runs out."""

import errno
import json
import re
import shutil

import pytest
import torch

import mtl.gradients
import mtl.training
import mtl.trouble
from mtl.cli import main
from mtl.errors import RankError
from mtl.trouble import explained_memory

ROWS = 30


@pytest.fixture
def command(tmp_path, monkeypatch, tiny_folder, make_task):
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    paths = {
        name: make_task(name, [{"prompt": f"{name} {i}", "completion": "ab" * (1 + i % 4)} for i in range(ROWS)])
        for name in ("one", "two")
    }

    def run(*overrides, folder="run"):
        code = main([
            *("train", f"model.name_or_path={tiny_folder}", "tasks=none", "batch_size=4", "max_steps=6"),
            *(f"tasks.{name}.path={path}" for name, path in paths.items()),
            *("eval_scores=false", "max_eval_examples=2", "max_test_examples=2", "eval_steps=2"),
            *("adapters.lora_dropout=0", f"output_dir={tmp_path / folder}", *overrides),
        ])  # fmt: skip
        return code, tmp_path / folder

    return run


def steps(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "loss" in record]


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss or the gradient of the task with a prompt of ``two`` NaN, from the third step on or in it only."""
    plain = mtl.gradients.target_nll
    forward_passes = {"step": -1}

    def poisoned(what, steps):
        def nll(model, micro_batch):
            losses = plain(model, micro_batch)
            if forward_passes["step"] in steps and 1 in micro_batch.tasks:
                factor = torch.nan if what == "loss" else 1.0
                losses = torch.where(micro_batch.label_tasks == 1, losses * factor, losses)
                if what == "gradient":
                    losses.register_hook(lambda gradient: gradient * torch.inf)
            return losses

        backward = mtl.gradients.Backward.__call__

        def call(self, batch, scale_T, *, step, apart):
            forward_passes["step"] = step
            return backward(self, batch, scale_T, step=step, apart=apart)

        monkeypatch.setattr(mtl.gradients, "target_nll", nll)
        monkeypatch.setattr(mtl.gradients.Backward, "__call__", call)

    return poisoned


@pytest.mark.parametrize("surgery", ["mean", "pcgrad"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_message_names_task_step_and_examples(command, poison, capsys, what, surgery):
    poison(what, {2})
    code, folder = command(f"surgery={surgery}")
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert f"Step 3: the {what} of task 'two' is " in error
    assert "(examples two.jsonl:" in error
    assert "'one'" not in error
    assert "non_finite=skip" in error
    assert (folder / "checkpoints" / "step-000002" / "manifest.json").exists()


def test_of_many_tasks_in_trouble_the_first_are_named(command, monkeypatch, capsys):
    plain = mtl.gradients.target_nll
    monkeypatch.setattr(mtl.gradients, "target_nll", lambda *arguments: plain(*arguments) * torch.nan)
    monkeypatch.setattr(mtl.trouble, "MAX_TASKS", 1)
    code, _ = command()
    error = capsys.readouterr().err
    assert code == 2
    assert "the loss of task 'one' is nan (examples one.jsonl:" in error
    assert "; and so for 1 more. " in error
    assert "'two'" not in error


@pytest.mark.parametrize("surgery", ["mean", "pcgrad"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_changes_no_parameter_and_no_statistic(command, poison, what, surgery):
    poison(what, {2})
    options = ["non_finite=skip", f"surgery={surgery}", "weighter=uncertainty", "adapters=shared_and_per_task"]
    seen = []
    plain = mtl.training.training_step

    def watched(run, parts):
        def snapshot():
            tensors = [p.detach().clone() for p in run.layout.parameters()]
            moments = [
                value.clone() for p in run.layout.parameters() for value in parts.optimizer.state.get(p, {}).values()
            ]
            return tensors + moments + [value.clone() for value in parts.weighter.state_dict().values()]

        before = snapshot()
        outcome = plain(run, parts)
        after = snapshot()
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        seen.append((outcome.finite, same))
        return outcome

    mtl.training.training_step = watched
    try:
        code, folder = command(*options)
    finally:
        mtl.training.training_step = plain
    assert code == 0
    assert [finite for finite, _ in seen] == [True, True, False, True, True, True]
    assert [same for _, same in seen] == [False, False, True, False, False, False]
    assert [record.get("skipped", False) for record in steps(folder)] == [False, False, True, False, False, False]


def test_skipping_has_a_limit(command, poison, capsys):
    poison("loss", {1, 2, 3})
    assert command("non_finite=skip", "max_skipped_steps=3")[0] == 0
    code, folder = command("non_finite=skip", "max_skipped_steps=2", folder="limited")
    assert code == 2
    assert "over max_skipped_steps" in capsys.readouterr().err
    assert len(steps(folder)) == 3


def test_the_guilty_examples_are_told_from_the_others(command, poison, capsys, monkeypatch):
    """Rows 4, 8, ... have the longest answers; only theirs are infinite."""
    poison("loss", {0})
    longest = 2 * 4 + 1

    def losses(model, examples, **options):
        return [torch.inf if int(example.is_target.sum()) == longest else 1.0 for example in examples]

    monkeypatch.setattr(mtl.trouble, "summed_losses", losses)
    assert command("batch_size=12")[0] == 2
    error = capsys.readouterr().err
    lines = [int(number) for number in re.findall(r"two\.jsonl:(\d+)", error)]
    assert lines
    assert all(line % 4 == 0 for line in lines)


def test_a_full_disk_keeps_the_last_good_checkpoint(command, capsys, monkeypatch):
    plain = mtl.training.save_checkpoint

    def full(folder, step, *args, **options):
        if step >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(folder, step, *args, **options)

    monkeypatch.setattr(mtl.training, "save_checkpoint", full)
    code, folder = command()
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "step 4 can't be written" in error
    assert "No space left on device" in error
    monkeypatch.undo()
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-000002"]


def test_a_folder_that_is_gone_is_one_line(command, capsys, monkeypatch, tmp_path):
    plain = mtl.training.training_step

    def step(run, parts):
        outcome = plain(run, parts)
        if run.state.step == 2:
            shutil.move(run.output_dir, tmp_path / "elsewhere")
        return outcome

    monkeypatch.setattr(mtl.training, "training_step", step)
    code, folder = command()
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert "run/metrics.jsonl: No such file or directory. The checkpoints so far are kept" in error
    assert not folder.exists()
    assert (tmp_path / "elsewhere" / "checkpoints" / "step-000002" / "manifest.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory_says_what_to_lower(prepared_options, error):
    message = r"micro_batch_tokens=384.*gradient_checkpointing"
    with pytest.raises(RankError, match=message) as raised, explained_memory(prepared_options):
        raise error
    assert "\n" not in str(raised.value)


def test_other_errors_stay_what_they_are(prepared_options):
    with pytest.raises(RuntimeError, match="something else"), explained_memory(prepared_options):
        raise RuntimeError("something else")


@pytest.fixture
def prepared_options():
    from mtl.composition import composed, settings_of

    return settings_of(composed([]), "unused").options
