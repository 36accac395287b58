from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.samplers import SkillIt
from mtl.samplers.skillit import measured_matrix

SIZES = [10, 20, 30]
MATRIX = [[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]]


def evaluated(losses: dict[int, float], step: int = 0) -> TaskFeedback:
    results = {task: {"loss": loss} for task, loss in losses.items()}
    return TaskFeedback(step, [], [], torch.empty(0), validation=results)


def expected(exponents: Any) -> np.ndarray:
    return np.exp(exponents) / np.exp(exponents).sum()


def test_golden() -> None:
    sampler = SkillIt(SIZES, matrix=MATRIX, eta=0.5, relative=False, floor=0.0)
    sampler.update(evaluated({0: 1.0, 1: 2.0, 2: 0.5}))
    np.testing.assert_allclose(sampler.probabilities, [0.383801, 0.434904, 0.181295], atol=6e-7)
    assert sampler.signals == {"loss": [1.0, 2.0, 0.5]}


def test_starts_with_the_tasks_that_help_most() -> None:
    """With relative losses the first evaluation is all ones, so p ~ exp(eta times the sums of the rows)."""
    sampler = SkillIt(SIZES, matrix=MATRIX, eta=0.4, floor=0.0)
    sampler.update(evaluated({0: 7.0, 1: 2.0, 2: 0.5}))
    np.testing.assert_allclose(sampler.probabilities, expected(0.4 * np.array([1.5, 1.5, 1.0])), rtol=1e-12)
    assert sampler.signals == {"loss_ratio": [1.0, 1.0, 1.0]}


def test_losses_of_the_window_are_added_up() -> None:
    sampler = SkillIt(SIZES, eta=0.5, window=2, floor=0.0)
    ratios = [[1.0, 1.0, 1.0], [0.5, 0.8, 1.0], [0.2, 0.9, 0.7], [0.1, 0.3, 0.6]]
    for step, row in enumerate(ratios):
        sampler.update(evaluated({task: (task + 1) * ratio for task, ratio in enumerate(row)}, step))
        window = np.array(ratios[max(0, step - 1) : step + 1]).sum(axis=0)
        np.testing.assert_allclose(sampler.probabilities, expected(0.5 * window), rtol=1e-12)


def test_an_evaluation_that_is_told_twice_counts_once() -> None:
    once, twice = SkillIt(SIZES), SkillIt(SIZES)
    for step, loss in enumerate((3.0, 1.0)):
        for sampler in (once, twice, twice):
            sampler.update(evaluated({0: loss, 1: 3.0, 2: 3.0}, step))
    assert once.probabilities == twice.probabilities
    assert once.state_dict() == twice.state_dict()


def test_a_task_left_out_keeps_its_loss_and_one_without_any_has_the_mean() -> None:
    sampler = SkillIt(SIZES, eta=0.5, window=1, floor=0.0)
    sampler.update(evaluated({0: 4.0, 1: 2.0}, 0))
    sampler.update(evaluated({0: 1.0}, 1))
    assert sampler.signals == {"loss_ratio": [0.25, 1.0, None]}
    np.testing.assert_allclose(sampler.probabilities, expected(0.5 * np.array([0.25, 1.0, 0.625])), rtol=1e-12)
    sampler.update(evaluated({2: 9.0}, 2))
    assert sampler.signals == {"loss_ratio": [0.25, 1.0, 1.0]}


def test_floor_and_training_steps() -> None:
    sampler = SkillIt(SIZES, matrix=[[50, 0, 0], [0, 0, 0], [0, 0, 0]], floor=0.3)
    sampler.update(TaskFeedback(0, [0], [4], torch.ones(1)))
    assert sampler.probabilities == pytest.approx([1 / 3] * 3)
    sampler.update(evaluated({0: 1.0, 1: 1.0, 2: 1.0}))
    assert sampler.probabilities == pytest.approx([0.8, 0.1, 0.1], abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": [[1, 0], [0, 1]]}, r"^matrix: must be 3 rows of 3, found rows of \[2, 2\]; "),
        ({"matrix": [[1, 0, float("nan")]] * 3}, r"^matrix: must be finite, found .*; 0 is no effect$"),
        ({"eta": 0.0}, r"^eta: must be above 0 and finite, found 0.0; "),
        ({"window": 0}, r"^window: must be at least 1 evaluation, found 0; "),
        ({"sizes": [1, 0, 1]}, r"^sizes: every task must have an example, found 0 at index 1; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkillIt(**({"sizes": SIZES} | arguments))


def test_the_matrix_of_runs_on_single_tasks() -> None:
    found = measured_matrix([4.0, 2.0], [[1.0, 1.5], [5.0, 0.5]])
    assert found == [[0.75, 0.25], [0.0, 0.75]]  # a task that makes another worse is of no use to it
    sampler = SkillIt([1, 1], matrix=found, eta=1.0, floor=0.0)
    sampler.update(evaluated({0: 1.0, 1: 1.0}))
    np.testing.assert_allclose(sampler.probabilities, expected([1.0, 0.75]), rtol=1e-12)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0, 0.0], [[1.0, 1.0], [1.0, 1.0]], r"^before_T: must be losses above 0, found \[1.0, 0.0\]; "),
        ([1.0, 1.0], [[1.0, 1.0]], r"^after_TT: must be 2 rows of as many losses, found \[2\]; "),
    ],
)
def test_runs_that_make_no_matrix(before: list[float], after: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured_matrix(before, after)
