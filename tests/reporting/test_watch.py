from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from mtl.reporting.watch import RunWatch


def record(
    losses: dict[str, float] | None = None,
    *,
    norm: float = 1.0,
    p: tuple[str, ...] = ("a",),
    counts: dict[str, int] | None = None,
    stage: str = "joint",
) -> dict[str, Any]:
    return {
        "stage": stage,
        "loss": losses or {},
        "grad_norm": norm,
        "p": dict.fromkeys(p, 1 / len(p)),
        "counts": dict.fromkeys(p, 1) if counts is None else counts,
    }


def warnings(steps: list[dict[str, Any]], epochs: Callable[[int], dict[str, float]] = lambda _: {}) -> list[str]:
    watch = RunWatch()
    return [warning for number, step in enumerate(steps) for warning in watch.observe(step, epochs(number))]


def test_a_sound_run_is_silent() -> None:
    noisy = [
        record({"a": 2.0 + math.sin(37.0 * step) - step / 400}, norm=1 + 0.9 * math.sin(step)) for step in range(600)
    ]
    assert warnings(noisy, lambda step: {"a": step / 120}) == []


def test_a_rising_loss_is_told_once_and_only_of_its_task() -> None:
    steps = [record({"a": 1.0 if step < 150 else 2.0, "b": 1.0}, p=("a", "b")) for step in range(600)]
    (warning,) = warnings(steps)
    assert warning.startswith("task 'a': training loss has risen 20% above its best")
    assert "learning_rate" in warning


def test_a_loss_that_rises_by_less_or_for_a_moment_is_no_warning() -> None:
    slightly = [record({"a": 1.0 if step < 150 else 1.19}) for step in range(900)]
    briefly = [record({"a": 3.0 if 150 <= step < 155 else 1.0}) for step in range(400)]
    assert warnings(slightly) == warnings(briefly) == []


def test_a_rise_counts_from_the_best_average_and_within_the_tasks_own_steps() -> None:
    falling = [record({"a": 4.0 - 3.0 * step / 300}) for step in range(300)]
    assert warnings(falling) == []
    absent = [record({"a": 1.0} if step % 10 == 0 else {"b": 1.0}, p=("a", "b")) for step in range(900)]
    risen = [record({"a": 9.0}, p=("a", "b"), counts={"a": 1, "b": 1}) for _ in range(9)]
    assert warnings(absent + risen) == []  # 99 steps of its own: too few to judge


@pytest.mark.parametrize(("norm", "told"), [(10.1, 1), (9.9, 0), (math.nan, 1), (math.inf, 1)])
def test_a_jump_of_the_gradient_norm(norm: float, told: int) -> None:
    steps = [record(norm=1.0)] * 30 + [record(norm=norm)] * 3 + [record(norm=1.0)] * 30 + [record(norm=norm)]
    found = warnings(steps)
    assert len(found) == told
    assert all("gradient norm" in warning and "max_grad_norm" in warning for warning in found)


def test_no_jump_before_there_is_a_median() -> None:
    assert warnings([record(norm=norm) for norm in [0.001] * 9 + [1.0] * 200]) == []


def test_starved_tasks_are_told_together_and_once() -> None:
    steps = [record(p=("a", "b", "c"), counts={"a": 2, "c": 0})] * 350
    (warning,) = warnings(steps)
    assert warning.startswith("tasks 'b', 'c': not one example in 100 steps")
    assert "batch_size" in warning


def test_one_example_in_a_window_is_not_starved() -> None:
    steps = [record(p=("a", "b"), counts={"a": 1} | ({"b": 1} if step % 100 == 99 else {})) for step in range(300)]
    assert warnings(steps) == []


def test_a_task_outside_of_the_stage_is_not_starved() -> None:
    first = [record(p=("a", "b"), counts={"a": 1, "b": 1})] * 60
    second = [record(p=("b",), counts={"b": 1}, stage="weak")] * 139
    short = [record(p=("a", "b"), counts={"b": 1}, stage="last")] * 99
    assert warnings(first + second + short) == []


def test_many_epochs_are_told_once() -> None:
    found = warnings([record()] * 100, lambda step: {"a": step / 15, "情感": 5.0})
    assert found == ["task 'a': training set seen more than 5 times; lower num_epochs, or use sampler=proportional"]


def test_many_names_are_cut() -> None:
    (warning,) = warnings([record()], lambda _: {f"t{number}": 6.0 for number in range(1600)})
    assert warning.startswith("tasks 't0', 't1', 't2', 't3', 't4' and 1595 more: ")
