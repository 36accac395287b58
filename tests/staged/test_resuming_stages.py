"""Interrupted anywhere in its stages, a run goes on bit for bit: at a border, at a choice of tasks, in a rollback."""

import json

import pytest

STAGED = {
    "interpolated": [
        *("adapters=shared", "stages=joint_then_weak", "stages.joint.tasks=[agrees]", "stages.weak.tasks=[denies]"),
        *("stages.joint.max_steps=6", "stages.weak.max_steps=6", "stages.weak.guard_confidence=null"),
        *("eval_steps=3", "stages.weak.kl_to_start=0.1"),
    ],
    "converging": [
        *("stages=weak_replay", "stages.joint.max_steps=4", "stages.weak_replay.max_steps=4", "task_patience=1"),
        *("stages.weak_replay.num_weakest=1", "stages.weak_replay.optimizer=carry", "eval_steps=1"),
        *("stages.weak_replay.max_train_examples=5", "stages.joint.max_train_examples=7", "learning_rate=0.05"),
    ],
    "floored": [
        *("stages=weak_private", "max_steps=3", "task_patience=1", "when_converged=floor", "eval_steps=1"),
        *("stages.weak_private.l2_to_start=5", "sampler=performance", "sampler.signal=loss_ratio"),
    ],
}
SMALL = ["max_eval_examples=8", "max_test_examples=4"]


@pytest.mark.parametrize("name", STAGED)
def test_resumed_at_every_checkpoint(tmp_path, command, interrupted_copy, outcome, name):
    options = [*STAGED[name], *SMALL]
    whole = command(tmp_path / "whole", *options)
    expected = outcome(whole)
    stages = json.loads((whole / "results.json").read_text(encoding="utf-8"))["stages"]
    if name == "interpolated":
        assert stages[1]["guard"]["harmed"], "the test needs a stage that harms"
    steps = sorted(int(path.name.removeprefix("step-")) for path in (whole / "checkpoints").glob("step-*"))
    assert len(steps) > 2
    for step in steps:
        copy = interrupted_copy(whole, step, tmp_path / f"at{step}")
        assert outcome(command(copy, *options, "resume_from_checkpoint=auto")) == expected, step


def test_asked_to_stop_at_every_moment_of_a_guarded_run(tmp_path, command, asked_later, outcome):
    options = [*STAGED["interpolated"], *SMALL, "task_patience=9", "when_converged=floor"]
    expected = outcome(command(tmp_path / "whole", *options))
    stopped = 0
    for looks in range(1, 200, 3):
        folder = tmp_path / f"look{looks}"
        with asked_later(looks):
            code = command(folder, *options, code=None)
        if code == 0:
            break
        assert code == 128 + 15
        stopped += 1
        command(folder, *options, "resume_from_checkpoint=auto")
        assert outcome(folder) == expected, looks
    assert stopped > 10


def test_a_run_that_begins_with_another_is_resumed(tmp_path, command, interrupted_copy, outcome):
    options = ["stages=weak_private", "max_steps=3", "eval_steps=1", *SMALL]
    first = command(tmp_path / "first", "max_steps=3", *SMALL)
    whole = command(tmp_path / "whole", *options, f"resume_from={first}")
    for step in (4, 5, 6):
        copy = interrupted_copy(whole, step, tmp_path / f"at{step}")
        resumed = command(copy, *options, f"resume_from={first}", "resume_from_checkpoint=auto")
        assert outcome(resumed) == outcome(whole), step
