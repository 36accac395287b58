"""A task that stops improving: frozen at its best, or sampled less; the best of each task is kept."""

import json

import pytest
import torch

from mtl.checkpoint import read_checkpoint

STAGES = ["early_stopping_patience=null", "stages.joint.max_steps=16", "eval_steps=1", "learning_rate=0.05"]


def evaluations(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "eval" in record]


def converged_after(losses, patience):
    """The first evaluation, counted from 1, with ``patience`` ones in a row that are not below the best."""
    best, bad = float("inf"), 0
    for number, loss in enumerate(losses, start=1):
        best, bad = (loss, 0) if loss < best else (best, bad + 1)
        if bad == patience:
            return number
    return None


def test_a_converged_task_is_frozen_at_its_best(tmp_path, command, results):
    folder = command(tmp_path / "run", *STAGES, "adapters=per_task", "task_patience=2")
    found = evaluations(folder)[1:]
    frozen = 0
    for index, task in enumerate(("agrees", "denies", "counts")):
        losses = [record["eval"][task]["loss"] for record in found[:16]]
        number = converged_after(losses, 2)
        if number is None:
            continue
        frozen += 1
        assert task in results(folder)["stages"][0]["converged"]
        assert all(loss == min(losses[:number]) for loss in losses[number:]), "it stays at its best from then on"
        states = [
            read_checkpoint(folder / "checkpoints" / f"step-{step:06d}").state["parameters"]
            for step in (number, results(folder)["stages"][0]["steps"])
        ]
        own = [name for name in states[0] if f"task{index}" in name.split(".")]
        assert own
        assert all(torch.equal(states[0][name], states[1][name]) for name in own)
    assert frozen, "the test needs a task that converges"


def test_each_task_ends_with_its_best_parameters(tmp_path, command, results):
    folder = command(tmp_path / "run", *STAGES, "adapters=per_task", "task_patience=99")
    found = evaluations(folder)[1:]
    own_best = results(folder)["stages"][0]["own_best"]
    for task in ("agrees", "denies", "counts"):
        losses = [record["eval"][task]["loss"] for record in found[:16]]
        # Nothing is shared, so the best is the best whatever the others do.
        assert results(folder)["tasks"][task]["val"]["loss"] == min(losses)
        assert (task in own_best) == (min(losses) < losses[-1])
    assert own_best, "the test needs a task whose last evaluation is not its best"


def test_with_shared_parameters_an_own_best_is_taken_only_where_it_is_better(tmp_path, command, results):
    folder = command(tmp_path / "run", *STAGES, "adapters=shared_and_per_task", "task_patience=99")
    last = evaluations(folder)[16]["eval"]
    for task in ("agrees", "denies", "counts"):
        taken = task in results(folder)["stages"][0]["own_best"]
        loss = results(folder)["tasks"][task]["val"]["loss"]
        assert loss < last[task]["loss"] if taken else loss == last[task]["loss"]


def test_a_converged_task_is_sampled_less(tmp_path, command, results):
    folder = command(
        tmp_path / "run", *STAGES, "adapters=shared", "task_patience=2", "when_converged=floor", "sampler=equal"
    )
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = {record["step"]: record for record in lines if "loss" in record}
    found = evaluations(folder)[1:]
    numbers = {}
    for task in ("agrees", "denies", "counts"):
        losses = [record["eval"][task]["loss"] for record in found[:16]]
        numbers[task] = converged_after(losses, 2) or 99
    assert min(numbers.values()) < max(steps), "the test needs a task that converges"
    for step, record in steps.items():
        floors = {task: 0.1 if step > number else 1.0 for task, number in numbers.items()}
        total = sum(floors.values())
        if set(floors.values()) == {0.1}:
            break
        assert record["p"] == pytest.approx({task: floor / total for task, floor in floors.items()})
