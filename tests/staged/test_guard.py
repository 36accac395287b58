"""A stage that contradicts another task: caught, and undone as far as need be; never by a look at test data."""

import json

import numpy as np
import pytest
import torch

import mtl.job
from mtl.checkpoint import newest_checkpoint, read_checkpoint
from mtl.evaluation import evaluate as evaluating
from mtl.evaluation.results import Prediction, TaskEvaluation
from mtl.guard import SCALES, Fall, fall

# First the one that agrees, then the one that denies, through one shared adapter.
STAGES = [
    *("adapters=shared", "stages=joint_then_weak", "stages.joint.tasks=[agrees]", "stages.weak.tasks=[denies]"),
    *("stages.joint.max_steps=12", "stages.weak.max_steps=12", "early_stopping_patience=null"),
]


def score(results, task, split="val"):
    return results["tasks"][task][split]["accuracy"]


def evaluations(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["eval"] for record in map(json.loads, lines) if "eval" in record]


def parameters_at(folder, step):
    return read_checkpoint(folder / "checkpoints" / f"step-{step:06d}").state["parameters"]


def test_without_a_guard_the_other_task_is_harmed(tmp_path, command, results):
    folder = command(tmp_path / "run", *STAGES, "stages.weak.guard=none")
    before = evaluations(folder)[2]["agrees"]["accuracy"]  # at the end of the first stage
    found = results(folder)
    assert before >= 0.8
    assert score(found, "agrees") <= before - 0.5
    assert score(found, "agrees", "test") <= before - 0.5
    assert "guard" not in found["stages"][1]


def test_a_rollback_ends_with_the_parameters_of_the_start(tmp_path, command, results, capsys):
    folder = command(tmp_path / "run", *STAGES, "stages.weak.guard=rollback")
    found = results(folder)
    guard = found["stages"][1]["guard"]
    assert guard["scale"] == 0.0
    assert set(guard["harmed"]) == {"agrees"}
    assert guard["harmed"]["agrees"] >= 0.5
    assert set(guard["drops"].values()) == {0.0}
    start, end = parameters_at(folder, 12), parameters_at(folder, 24)
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert found["tasks"]["agrees"]["val"] == evaluations(folder)[2]["agrees"]
    assert "guard: agrees by" in capsys.readouterr().out


def test_an_interpolation_goes_as_far_as_no_task_is_harmed(tmp_path, command, results):
    folder = command(tmp_path / "run", *STAGES, "stages.weak.guard=interpolate", "stages.weak.guard_confidence=null")
    found = results(folder)
    guard = found["stages"][1]["guard"]
    before = evaluations(folder)[2]
    assert guard["scale"] in (*SCALES, 0.0)
    assert before["agrees"]["accuracy"] - score(found, "agrees") <= 0.02
    assert guard["drops"]["agrees"] == pytest.approx(before["agrees"]["accuracy"] - score(found, "agrees"))
    start, end = parameters_at(folder, 12), parameters_at(folder, 24)
    unguarded = command(tmp_path / "unguarded", *STAGES, "stages.weak.guard=none")
    moved = parameters_at(unguarded, 24)
    for name in start:
        torch.testing.assert_close(end[name], start[name] + guard["scale"] * (moved[name] - start[name]))
    if guard["scale"]:  # taken only where all tasks together are better off
        ratios = [found["tasks"][t]["val"]["loss"] / evaluations(folder)[0][t]["loss"] for t in found["tasks"]]
        at_start = [before[t]["loss"] / evaluations(folder)[0][t]["loss"] for t in found["tasks"]]
        assert np.mean(ratios) < np.mean(at_start)


def test_an_evaluation_that_harms_is_never_the_best(tmp_path, command, results):
    options = ["stages.weak.guard=rollback", "early_stopping_patience=2", "stages.weak.max_steps=20", "eval_steps=2"]
    folder = command(tmp_path / "run", *STAGES, *options, "select_by=mean_score")
    guarded = results(folder)["stages"][1]
    assert guarded["steps"] < 20, "nothing but harm: the stage has stopped early"
    before = evaluations(folder)[6]["agrees"]["accuracy"]
    assert before - score(results(folder), "agrees") <= 0.02 or guarded["guard"]["scale"] == 0.0


def test_a_stage_that_harms_none_is_kept_whole(tmp_path, command, results):
    folder = command(
        tmp_path / "run",
        *("adapters=per_task", "stages=joint_then_weak", "stages.weak.tasks=[denies]", "stages.joint.max_steps=2"),
        *("stages.weak.max_steps=4", "stages.weak.guard=interpolate"),
    )
    guard = results(folder)["stages"][1]["guard"]
    assert (guard["scale"], guard["harmed"]) == (1.0, {})
    assert guard["drops"] == {"agrees": 0.0, "counts": 0.0}


def test_test_data_are_not_looked_at_before_the_stages_are_over(tmp_path, command, monkeypatch, results):
    training = False
    plain_stages, plain_select = mtl.job.run_stages, evaluating.select_examples

    def run_stages(*arguments):
        nonlocal training
        training = True
        plain_stages(*arguments)
        training = False

    def select_examples(data, split, max_examples):
        assert not (training and split == "test"), "test data in the training"
        return plain_select(data, split, max_examples)

    monkeypatch.setattr(mtl.job, "run_stages", run_stages)
    monkeypatch.setattr(evaluating, "select_examples", select_examples)
    options = ["adapters=shared_and_per_task", "task_patience=1", "early_stopping_patience=2", "eval_steps=2"]
    folder = command(tmp_path / "run", *STAGES, *options, "stages.weak.guard=interpolate")
    assert results(folder)["stages"][1]["guard"]["action"] == "interpolate"


def scored(values, metric="accuracy"):
    predictions = [Prediction("", "x", "x", "x" if value else "y", float(value), "", 1.0, 1, True) for value in values]
    return TaskEvaluation(1.0, len(values), len(values), metric, {metric: float(np.mean(values))}, predictions)


def test_a_fall_within_the_noise_harms_nobody():
    before = scored([1] * 50)
    few, many = scored([1] * 48 + [0] * 2), scored([1] * 40 + [0] * 10)
    assert fall(before, few, confidence=None, seed=0) == Fall(pytest.approx(0.04), pytest.approx(0.04))
    assert not fall(before, few, confidence=0.95, seed=0).harms(0.02)
    assert fall(before, few, confidence=None, seed=0).harms(0.02)
    sure = fall(before, many, confidence=0.95, seed=0)
    # The lower end of a one-sided 95 % interval of a share of 10 in 50: 0.2 - 1.645 sqrt(.2 * .8 / 50).
    assert sure.surely == pytest.approx(0.2 - 1.645 * np.sqrt(0.2 * 0.8 / 50), abs=0.02)
    assert sure.harms(0.02)
    assert not sure.harms(0.3), "more than noise, but allowed"
    assert not fall(many, before, confidence=0.95, seed=0).harms(0.0), "a rise"


def test_one_example_proves_nothing():
    assert not fall(scored([1]), scored([0]), confidence=0.95, seed=0).harms(0.02)


def losses(values, targets):
    total = sum(values) / sum(targets)
    return TaskEvaluation(total, len(values), sum(targets), None, {}, [], values)


def test_where_there_is_only_a_loss_its_relative_rise_counts():
    generator = np.random.default_rng(0)
    values, targets = generator.uniform(1, 3, 60), generator.integers(1, 5, 60)
    before = losses(list(values), list(targets))
    alike, worse = losses(list(values * 1.1), list(targets)), losses(list(values[::-1] * 1.01), list(targets))
    found = fall(before, alike, confidence=0.95, seed=0)
    assert found.drop == pytest.approx(0.1)
    assert found.surely == pytest.approx(0.1), "every example rose alike"
    assert found.harms(0.02)
    assert not fall(before, worse, confidence=0.95, seed=0).harms(0.0), "other examples rose than fell"


def test_the_newest_checkpoint_holds_what_the_stage_ended_with(tmp_path, command):
    folder = command(tmp_path / "run", *STAGES, "stages.weak.guard=rollback")
    newest, _ = newest_checkpoint(folder)
    start = parameters_at(folder, 12)
    assert all(torch.equal(start[name], newest.state["parameters"][name]) for name in start)
    assert newest.state["start_parameters"] is None
