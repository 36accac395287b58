"""What a stage trains, on which tasks and by which levers; runs that begin with another run."""

import json

import pytest
import torch

from mtl.checkpoint import read_checkpoint

LAYOUTS = ["per_task", "shared_and_per_task", "shared_a_per_task_b", "experts"]


def records(folder):
    return list(map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()))


def steps_of(folder, stage):
    return [record for record in records(folder) if "loss" in record and record["stage"] == stage]


def parameters_at(folder, step):
    return read_checkpoint(folder / "checkpoints" / f"step-{step:06d}").state["parameters"]


def moved(folder, first, last):
    before, after = parameters_at(folder, first), parameters_at(folder, last)
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_private_stage_leaves_every_other_task_byte_for_byte(tmp_path, command, layout):
    options = [f"adapters={layout}", "stages.joint.max_steps=3", "early_stopping_patience=null"]
    joint = command(tmp_path / "joint", *options)
    weak = command(
        tmp_path / "weak",
        *options,
        *(f"resume_from={joint}", "stages=weak_private", "stages.weak_private.max_steps=4"),
        "stages.weak_private.tasks=[denies]",
    )
    for task in ("agrees", "counts"):
        first, second = (folder / "predictions" / f"{task}.jsonl" for folder in (joint, weak))
        assert first.read_bytes() == second.read_bytes()
    assert (joint / "predictions" / "denies.jsonl").read_bytes() != (weak / "predictions" / "denies.jsonl").read_bytes()
    before = read_checkpoint(joint / "checkpoints" / "step-000003").state["parameters"]
    after = parameters_at(weak, 7)
    own = {name for name in before if not torch.equal(before[name], after[name])}
    assert own
    assert all("task1" in name.split(".") for name in own)


@pytest.mark.parametrize(("trainable", "part"), [("shared", "shared"), ("private", "task1")])
def test_only_the_trainable_part_moves(tmp_path, command, trainable, part):
    folder = command(
        tmp_path / "run",
        *("stages=joint_then_weak", "stages.joint.max_steps=2", "stages.weak.max_steps=3", "stages.weak.guard=none"),
        *("stages.weak.tasks=[denies]", f"stages.weak.trainable={trainable}", "surgery=pcgrad"),
        "early_stopping_patience=null",
    )
    found = moved(folder, 2, 5)
    assert found
    assert all(part in name.split(".") for name in found)


def test_the_weak_tasks_are_those_furthest_below_the_reference(tmp_path, command, results, capsys):
    alone = tmp_path / "alone"
    for task, score in (("agrees", 0.8), ("denies", 0.9), ("counts", 0.1)):
        folder = alone / task
        folder.mkdir(parents=True)
        values = {"accuracy": score, "loss": 1.0, "num_examples": 20}
        content = {
            "metric": "accuracy",
            **dict.fromkeys(("base", "val", "test"), values),
            **dict.fromkeys(("examples_seen", "epochs_seen", "target_tokens_seen"), 1),
        }
        cost = dict.fromkeys(
            ("steps", "tokens", "target_tokens", "seconds", "tokens_per_second", "peak_memory_bytes"), 1
        )
        whole = {"schema": 1, "strategy": {}, "seed": 0, "model": "m", "tasks": {task: content}, "cost": cost}
        (folder / "results.json").write_text(json.dumps(whole), encoding="utf-8")
    folder = command(
        tmp_path / "run",
        *("adapters=shared", "stages=joint_then_weak", "stages.joint.tasks=[agrees]", "stages.joint.max_steps=12"),
        *("stages.weak.weakness=reference", f"reference={alone}", "stages.weak.max_steps=2"),
        *("stages.weak.num_weakest=null", "stages.weak.guard=none"),
    )
    stage = results(folder)["stages"][1]
    assert stage["tasks"] == ["denies"]
    values = stage["weakness"]
    assert values["by"] == "reference"
    at_start = next(r["eval"] for r in reversed(records(folder)) if "eval" in r and r["step"] <= 12)
    assert values["tasks"]["denies"] == pytest.approx((0.9 - at_start["denies"]["accuracy"]) / 0.9)
    assert values["tasks"]["counts"] < 0
    said = capsys.readouterr().out
    assert (
        f"gap to the val score of the task trained alone, relative to it: denies {values['tasks']['denies']:.3f}"
        in said
    )


def test_a_stage_without_a_weak_task_is_skipped_with_a_line(tmp_path, command, results, capsys):
    folder = command(
        tmp_path / "run",
        *("stages=joint_then_weak", "stages.joint.max_steps=2", "stages.weak.weakness=target"),
        "stages.weak.targets.agrees=0.0",
    )
    assert "Stage weak: skipped, no task is weak by weakness=target" in capsys.readouterr().out
    stage = results(folder)["stages"][1]
    assert (stage["steps"], stage["skipped"]) == (0, "no task is weak by weakness=target")
    assert results(folder)["cost"]["steps"] == 2


def test_each_stage_has_its_own_levers(tmp_path, command):
    folder = command(
        tmp_path / "run",
        *("adapters=shared", "stages=joint_then_weak", "stages.weak.tasks=[denies,counts]", "max_steps=3"),
        *("+sampler@stages.weak.sampler=specified", "stages.weak.sampler.probabilities={denies:3,counts:1}"),
        *("+weighter@stages.weak.weighter=static", "stages.weak.weighter.weights.counts=2"),
        *("+surgery@stages.weak.surgery=pcgrad", "stages.weak.guard=none", "stages.weak.learning_rate=0.001"),
        *("stages.weak.batch_size=4", "early_stopping_patience=null"),
    )
    joint, weak = steps_of(folder, "joint"), steps_of(folder, "weak")
    assert all(record["w"] is None and set(record["lambda"].values()) == {1.0} for record in joint)
    assert all(record["p"] == {"denies": 0.75, "counts": 0.25} for record in weak)
    assert all(record["lambda"] == {"denies": 1.0, "counts": 2.0} for record in weak)
    assert all(record["w"] is not None and sum(record["counts"].values()) == 4 for record in weak)
    assert {record["learning_rate"] for record in weak} == {0.001}


def test_replay_mixes_the_others_in(tmp_path, command, results, capsys):
    folder = command(
        tmp_path / "run",
        *("adapters=shared", "stages=weak_replay", "stages.weak_replay.tasks=[denies]", "max_steps=8"),
        *("stages.weak_replay.guard=none", "early_stopping_patience=null"),
    )
    weak = steps_of(folder, "weak_replay")
    assert all(r["p"] == pytest.approx({"agrees": 0.125, "denies": 0.75, "counts": 0.125}) for r in weak)
    seen = [sum(record["counts"].get(task, 0) for record in weak) for task in ("agrees", "denies", "counts")]
    assert seen == [8, 48, 8]
    stage = results(folder)["stages"][1]
    assert (stage["tasks"], stage["replayed"]) == (["denies"], ["agrees", "counts"])
    assert "replaying 25% of agrees, counts" in capsys.readouterr().out


def test_a_limited_stage_sees_few_examples_again_and_again(tmp_path, command):
    folder = command(
        tmp_path / "run", "stages.joint.max_train_examples=2", "stages.joint.num_epochs=5", "evals_per_stage=1"
    )
    assert len(steps_of(folder, "joint")) == 4  # 5 epochs of 3 tasks with 2 examples, 8 a step


def test_the_pull_to_the_start_is_the_decoupled_one(tmp_path, command):
    """One step of SGD and the pull, against the formula; and AdamW's moments must not feel it."""
    options = [
        *("adapters=shared", "stages=joint_then_weak", "stages.joint.max_steps=2", "stages.weak.max_steps=2"),
        *("stages.weak.tasks=[denies]", "stages.weak.guard=none", "early_stopping_patience=null", "eval_steps=1"),
    ]
    plain = command(tmp_path / "plain", *options)
    pulled = command(tmp_path / "pulled", *options, "stages.weak.l2_to_start=10")
    start, first, expected = (parameters_at(plain, step) for step in (2, 3, 3))
    found = parameters_at(pulled, 3)
    for name in start:
        expected[name] = first[name] - 0.02 * 10 * (first[name] - start[name])
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-15)
    moments = [
        read_checkpoint(folder / "checkpoints" / "step-000003").state["parts"]["optimizer"]["state"]["state"]
        for folder in (plain, pulled)
    ]
    assert all(
        torch.equal(moments[0][index][key], moments[1][index][key]) for index in moments[0] for key in moments[0][index]
    )


def test_the_optimizer_is_carried_over(tmp_path, command):
    options = [
        *("adapters=shared", "stages=joint_then_weak", "stages.joint.max_steps=3", "stages.weak.max_steps=1"),
        *("stages.weak.tasks=all", "stages.weak.guard=none", "early_stopping_patience=null", "eval_steps=1"),
    ]
    fresh = command(tmp_path / "fresh", *options)
    carried = command(tmp_path / "carried", *options, "stages.weak.optimizer=carry")
    whole = command(
        tmp_path / "whole", "adapters=shared", "max_steps=4", "early_stopping_patience=null", "eval_steps=1"
    )
    ends = [parameters_at(folder, 4) for folder in (fresh, carried, whole)]
    assert all(torch.equal(ends[1][name], ends[2][name]) for name in ends[1]), "as if there had been no border"
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[1])


def test_a_run_begins_with_a_finished_run(tmp_path, command, results, capsys):
    options = ["stages.joint.max_steps=4", "early_stopping_patience=null"]
    first = command(tmp_path / "first", *options)
    both = command(
        tmp_path / "both",
        *(*options, "stages=weak_private", "stages.weak_private.max_steps=2", "stages.weak_private.tasks=[denies]"),
    )
    second = command(
        tmp_path / "second",
        *(*options, f"resume_from={first}", "stages=weak_private", "stages.weak_private.max_steps=2"),
        "stages.weak_private.tasks=[denies]",
    )
    ends = [parameters_at(folder, 6) for folder in (both, second)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), "in two runs as in one"
    assert results(second)["tasks"] == results(both)["tasks"]
    assert [stage["stage"] for stage in results(second)["stages"]] == ["joint", "weak_private"]
    assert results(second)["cost"]["steps"] == 6
    assert [record["step"] for record in records(second) if "loss" in record] == [5, 6]
    capsys.readouterr()
    command(tmp_path / "third", f"resume_from={second}", *options, "stages=weak_private", code=None)
    assert "has had joint, weak_private already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["stages.joint.tasks=[nobody]"], "stages.joint.tasks=nobody: must be among the run's tasks, agrees, denies"),
        (["stages.joint.trainable=private", "adapters=shared"], "stages.joint.trainable=private: the adapters have no"),
        (["stages.joint.trainable=shared", "adapters=per_task"], "stages.joint.trainable=shared: the adapters have no"),
        (["stages.joint.optimizer=carry"], "stages.joint.optimizer=carry: there is no stage before it"),
        (["stages.joint.guard=rollback"], "stages.joint.guard=rollback: protects the tasks that a stage does not have"),
        (["stages.joint.replay=0.2"], "stages.joint.replay=0.2: needs other tasks than the stage's"),
        (
            ["stages=joint_then_weak", "stages.weak.weakness=reference"],
            "Set reference=<folder of the single-task runs>",
        ),
        (
            ["stages=joint_then_weak", "stages.weak.weakness=size"],
            "stages.weak.weakness=size: must be one of loss_ratio",
        ),
        (["stages=joint_then_weak", "stages.weak.weakness=target"], "stages.weak.targets={}: must give a score"),
        (
            ["stages=joint_then_weak", "stages.weak.weakness=score", "eval_scores=false"],
            "eval_scores=false computes none",
        ),
        (["select_by=worst_change"], "select_by=worst_change: compares with the tasks trained alone"),
        (["select_by=mean_score", "eval_scores=false"], "select_by=mean_score: goes by validation scores"),
        (["reference=nowhere"], "reference=nowhere: holds no finished run"),
        (["resume_from=nowhere"], "resume_from=nowhere: no checkpoint there that verifies"),
        (["task_patience=1", "adapters=shared"], "when_converged=freeze: the adapters have no private parameters"),
        (["converged_floor=0"], "converged_floor=0.0: must be a share"),
        (["stages.joint.guard_confidence=0.2"], "stages.joint.guard_confidence=0.2: must be at least 0.5"),
        (["stages.joint.sampler={temperature: 2}"], "stages.joint.sampler: must be a class with its options"),
        (
            ["+sampler@stages.joint.sampler=equal", "stages.joint.sampler.seed=1"],
            "stages.joint.sampler.seed: is set by",
        ),
        (
            ["+surgery@stages.joint.surgery=imtlg", "weighter=uncertainty"],
            "surgery=IMTLG with weighter=Uncertainty: loss weights act through it: no",
        ),
    ],
)
def test_stages_that_cannot_work_are_refused_before_anything_is_written(tmp_path, command, capsys, options, message):
    assert command(tmp_path / "run", "max_steps=1", *options, code=None) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["adapters.lora_r=4"], "has other parameters than this run"),
        (["~tasks.counts"], "has the tasks agrees, denies, counts, and this run agrees, denies"),
    ],
)
def test_a_run_of_another_kind_is_nothing_to_begin_with(tmp_path, command, capsys, options, message):
    first = command(tmp_path / "first", "max_steps=1")
    capsys.readouterr()
    assert command(tmp_path / "second", f"resume_from={first}", "stages=weak_private", *options, code=None) == 2
    assert message in capsys.readouterr().err
