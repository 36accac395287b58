"""A run that stopped at any checkpoint goes on bit for bit, across the border of stages too."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from mtl.cli import main

WORDS = ["red", "green", "blue", "up", "down"]


@pytest.fixture
def command(tmp_path, monkeypatch, tiny_folder, make_task):
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    sizes = {"small": 24, "middle": 40, "large": 90}
    paths = {
        name: make_task(name, [{"prompt": f"{name} {i}", "completion": f"{WORDS[i % 5]}{i % 3}"} for i in range(size)])
        for name, size in sizes.items()
    }

    def run(output_dir, *overrides):
        assert main([
            "train",
            f"model.name_or_path={tiny_folder}",
            "tasks=none",
            *(f"tasks.{name}.path={path}" for name, path in paths.items()),
            *(f"tasks.{name}.max_new_tokens=4" for name in paths),
            "batch_size=5",
            "learning_rate=0.01",
            "max_eval_examples=3",
            "max_test_examples=3",
            "eval_steps=1",
            "save_total_limit=99",
            f"output_dir={output_dir}",
            *overrides,
        ]) == 0  # fmt: skip
        return output_dir

    return run


def interrupted_copy(folder, step, target):
    """What a run that was killed after the checkpoint of ``step`` leaves: later records, even torn ones, too."""
    shutil.copytree(folder, target)
    (target / "results.json").unlink()
    for later in (target / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    (target / "checkpoints" / "latest").write_text(f"step-{step:06d}")
    with (target / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 99, "torn')
    return target


def outcome(folder):
    """Everything that must not depend on the interruption: records, final tensors and state, results without cost."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results.pop("cost")
    last = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    for cost in ("training_seconds", "total_seconds"):
        state["run"].pop(cost)
    tensors = {key: value.numpy().tobytes() for key, value in load_file(last / "tensors.safetensors").items()}
    return (folder / "metrics.jsonl").read_bytes(), results, state, tensors


LEVERS = ["sampler=performance", "weighter=uncertainty", "surgery=pcgrad", "adapters=shared_and_per_task"]


def test_resume_is_bitwise_in_and_between_two_stages(tmp_path, command):
    levers = [*LEVERS, "stages=joint_then_weak", "max_steps=2"]
    whole = command(tmp_path / "whole", *levers)
    expected = outcome(whole)
    assert [json.loads(line)["stage"] for line in expected[0].splitlines()].count("weak") >= 4
    for step in (1, 2, 3, 4):
        resumed = command(interrupted_copy(whole, step, tmp_path / f"at{step}"), *levers, "resume_from_checkpoint=auto")
        assert outcome(resumed) == expected, step


@pytest.mark.parametrize(
    "levers",
    [
        ["sampler=temperature", "weighter=static", "weighter.weights.small=3", "adapters=per_task"],
        ["sampler=performance", "sampler.signal=loss_ratio", "surgery=pcgrad", "adapters=shared"],
        ["sampler=equal", "weighter=uncertainty", "adapters=full", "scheduler=linear", "learning_rate=1e-4"],
        ["sampler=proportional", "early_stopping_patience=null", "packing=false", "share=equal"],
    ],
)
def test_resume_is_bitwise_for_other_levers(tmp_path, command, levers):
    whole = command(tmp_path / "whole", "max_steps=3", *levers)
    resumed = command(
        interrupted_copy(whole, 2, tmp_path / "resumed"), "max_steps=3", *levers, "resume_from_checkpoint=auto"
    )
    assert outcome(resumed) == outcome(whole)


def test_a_run_that_never_reached_a_checkpoint_starts_again(tmp_path, command):
    whole = command(tmp_path / "whole", "max_steps=1")
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(whole / "metrics.jsonl", again)
    command(again, "max_steps=1", "resume_from_checkpoint=auto")
    assert outcome(again) == outcome(whole)


def test_a_finished_run_is_not_trained_over(tmp_path, command, capsys):
    command(tmp_path / "run", "max_steps=1")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(AssertionError):
        command(tmp_path / "run", "max_steps=1")
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["adapters.lora_r=5"], "other parameters"),
        (["surgery=pcgrad"], "other strategy"),
        (["~tasks.small"], "other tasks"),
        (["tasks.small.max_train_examples=7"], "other tasks than this run: small was 20, is 7"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, command, capsys, change, message
):
    whole = command(tmp_path / "whole", "max_steps=2")
    copy = interrupted_copy(whole, 1, tmp_path / "copy")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(AssertionError):
        command(copy, "max_steps=2", "resume_from_checkpoint=auto", *change)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_another_run_is_not_resumed_into_an_occupied_folder(tmp_path, command, capsys):
    first, second = (command(tmp_path / name, "max_steps=1") for name in ("first", "second"))
    before = (second / "metrics.jsonl").read_bytes()
    with pytest.raises(AssertionError):
        command(second, "max_steps=1", f"resume_from_checkpoint={first}")
    assert "already holds another run" in capsys.readouterr().err
    assert (second / "metrics.jsonl").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(tmp_path, command):
    whole = command(tmp_path / "whole", "max_steps=2")
    expected = outcome(whole)
    assert outcome(command(whole, "max_steps=2", "resume_from_checkpoint=auto")) == expected
