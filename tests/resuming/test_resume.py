"""A run that stopped at any checkpoint goes on bit for bit, across the border of stages too."""

import json
import shutil

import pytest

LEVERS = ["sampler=performance", "weighter=uncertainty", "surgery=pcgrad", "adapters=shared_and_per_task"]


def test_resume_is_bitwise_in_and_between_two_stages(tmp_path, command, interrupted_copy, outcome):
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
def test_resume_is_bitwise_for_other_levers(tmp_path, command, levers, interrupted_copy, outcome):
    whole = command(tmp_path / "whole", "max_steps=3", *levers)
    resumed = command(
        interrupted_copy(whole, 2, tmp_path / "resumed"), "max_steps=3", *levers, "resume_from_checkpoint=auto"
    )
    assert outcome(resumed) == outcome(whole)


def test_a_run_that_never_reached_a_checkpoint_starts_again(tmp_path, command, outcome):
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
        (["adapters.lora_r=5"], "adapters.lora_r was 16, is 5"),
        (["surgery=pcgrad"], "surgery._target_ was mtl.surgery.Mean, is mtl.surgery.PCGrad"),
        (["learning_rate=0.02", "batch_size=6"], "batch_size was 5, is 6; learning_rate was 0.01, is 0.02"),
        (["max_steps=3"], "max_steps was 2, is 3"),
        (["seed=1"], "seed was 0, is 1"),
        (["~tasks.small"], "tasks.small"),
        (["tasks.small.max_train_examples=7"], "tasks.small.max_train_examples was not set, is 7"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, command, capsys, change, message, interrupted_copy
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


def test_other_data_of_the_same_name_are_refused(tmp_path, command, capsys, interrupted_copy):
    whole = command(tmp_path / "whole", "max_steps=2")
    copy = interrupted_copy(whole, 1, tmp_path / "copy")
    file = tmp_path / "data" / "small.jsonl"
    file.write_text(file.read_text().replace("red0", "pink"))
    with pytest.raises(AssertionError):
        command(copy, "max_steps=2", "resume_from_checkpoint=auto")
    assert "the checkpoint has other tasks than this run: small was 20 examples, " in capsys.readouterr().err


def test_data_and_model_may_move(tmp_path, command, tiny_folder, interrupted_copy, outcome):
    whole = command(tmp_path / "whole", "max_steps=2")
    moved = interrupted_copy(whole, 1, tmp_path / "moved")
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(tmp_path / "data" / "small.jsonl", tmp_path / "data" / "tiny.jsonl")
    command(
        moved,
        *("max_steps=2", "resume_from_checkpoint=auto", f"model.name_or_path={tmp_path / 'model'}"),
        f"tasks.small.path={tmp_path / 'data' / 'tiny.jsonl'}",
    )
    expected, found = outcome(whole), outcome(moved)
    assert found[0] == expected[0]
    assert found[2:] == expected[2:]


def test_a_changed_config_is_taken_when_told_to(tmp_path, command, capsys, interrupted_copy, outcome):
    whole = command(tmp_path / "whole", "max_steps=2")
    copy = interrupted_copy(whole, 1, tmp_path / "copy")
    change = ["max_steps=4", "surgery=pcgrad", "allow_config_change=true"]
    command(copy, "resume_from_checkpoint=auto", *change)
    said = capsys.readouterr().out
    assert "max_steps was 2, is 4" in said
    assert "the surgery is another one than the checkpoint's and starts afresh" in said
    assert outcome(copy)[2]["run"]["step"] == 4


def test_another_environment_is_warned_of(tmp_path, command, capsys, interrupted_copy):
    whole = command(tmp_path / "whole", "max_steps=2")
    capsys.readouterr()
    command(interrupted_copy(whole, 1, tmp_path / "same"), "max_steps=2", "resume_from_checkpoint=auto")
    assert "resuming where" not in capsys.readouterr().out
    command(
        interrupted_copy(whole, 1, tmp_path / "copy"),
        *("max_steps=2", "resume_from_checkpoint=auto", "micro_batch_tokens=100"),
    )
    said = capsys.readouterr().out
    assert "resuming where micro_batch_tokens was 384, is 100" in said
    assert "not bit for bit" in said


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, command, capsys, interrupted_copy, outcome):
    whole = command(tmp_path / "whole", "max_steps=4")
    copy = interrupted_copy(whole, 3, tmp_path / "copy")
    file = copy / "checkpoints" / "step-000003" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    command(copy, "max_steps=4", "resume_from_checkpoint=auto")
    assert "step-000003/tensors.safetensors" in capsys.readouterr().out
    assert outcome(copy) == outcome(whole)


def test_asked_to_stop_at_every_moment_it_goes_on_bit_for_bit(tmp_path, command, asked_later, capsys, outcome):
    levers = [*LEVERS, "stages=joint_then_weak", "max_steps=2", "eval_steps=2"]
    whole = command(tmp_path / "whole", *levers)
    expected = outcome(whole)
    stopped_at = []
    for looks in range(1, 100):
        folder = tmp_path / f"look{looks}"
        with asked_later(looks):
            code = command(folder, *levers, f"cache_dir={tmp_path / 'caches' / str(looks)}", code=None)
        if code == 0:
            break
        assert code == 128 + 15
        said = capsys.readouterr().out
        stopped_at.append(int(said.split("Stopped by SIGTERM after step ")[1].split(",")[0]))
        command(folder, *levers, "resume_from_checkpoint=auto")
        assert outcome(folder) == expected, looks
    assert set(stopped_at) == {0, 1, 2, 3, 4}


def test_another_run_is_not_resumed_into_an_occupied_folder(tmp_path, command, capsys):
    first, second = (command(tmp_path / name, "max_steps=1") for name in ("first", "second"))
    before = (second / "metrics.jsonl").read_bytes()
    with pytest.raises(AssertionError):
        command(second, "max_steps=1", f"resume_from_checkpoint={first}")
    assert "already holds another run" in capsys.readouterr().err
    assert (second / "metrics.jsonl").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(tmp_path, command, outcome):
    whole = command(tmp_path / "whole", "max_steps=2")
    expected = outcome(whole)
    assert outcome(command(whole, "max_steps=2", "resume_from_checkpoint=auto")) == expected
