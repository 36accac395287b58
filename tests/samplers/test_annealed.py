from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.samplers import Annealed, Proportional, Temperature

SIZES = [100, 1_000, 10_000, 100_000]
STEP = TaskFeedback(0, [0], [16], torch.ones(1))
EVALUATION = TaskFeedback(0, [], [], torch.empty(0), validation={0: {"loss": 1.0, "score": 0.0}})


def probabilities_of_a_stage(sampler: Annealed, num_steps: int) -> np.ndarray:
    """Those that each step is drawn with."""
    rows = []
    for _ in range(num_steps):
        rows.append(sampler.probabilities)
        sampler.counts(16)
        sampler.update(STEP)
    return np.array(rows)


def test_the_exponent_falls_in_equal_parts_and_always_from_the_sizes() -> None:
    rows = probabilities_of_a_stage(Annealed(SIZES, num_steps=25), 25)
    for epoch, row in enumerate(rows, start=1):
        alpha = 1 - 0.8 * (epoch - 1) / (25 - 1)  # as in the code of the paper
        expected = np.array(SIZES, dtype=float) ** alpha
        np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-12)
    np.testing.assert_allclose(rows[0], Proportional(SIZES).probabilities, rtol=1e-12)
    np.testing.assert_allclose(rows[-1], Temperature(SIZES, temperature=5.0).probabilities, rtol=1e-12)


def test_the_smallest_task_only_gains() -> None:
    rows = probabilities_of_a_stage(Annealed(SIZES, num_steps=50), 50)
    assert (np.diff(rows[:, 0]) > 0).all()
    assert (np.diff(rows[:, -1]) < 0).all()


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_shortest_stages(num_steps: int) -> None:
    rows = probabilities_of_a_stage(Annealed([1, 8], num_steps=num_steps, alpha_end=0.0), num_steps)
    np.testing.assert_allclose(rows, [[1 / 9, 8 / 9], [0.5, 0.5]][:num_steps], rtol=1e-12)


def test_evaluations_are_no_steps_and_the_end_stays() -> None:
    sampler = Annealed(SIZES, num_steps=5)
    for _ in range(3):
        sampler.update(EVALUATION)
    np.testing.assert_allclose(sampler.probabilities, Proportional(SIZES).probabilities)
    for _ in range(4):
        sampler.update(STEP)
    end = sampler.probabilities
    np.testing.assert_allclose(end, Temperature(SIZES, temperature=5.0).probabilities, rtol=1e-12)
    sampler.update(STEP)
    assert sampler.probabilities == end


def test_equal_exponents_are_a_fixed_mixture() -> None:
    rows = probabilities_of_a_stage(Annealed(SIZES, num_steps=6, alpha_start=0.5, alpha_end=0.5), 6)
    np.testing.assert_allclose(rows, [Temperature(SIZES, temperature=2.0).probabilities] * 6)


def test_large_exponents_stay_finite() -> None:
    rows = probabilities_of_a_stage(Annealed([1, 10**12], num_steps=3, alpha_start=300.0, alpha_end=-300.0), 3)
    np.testing.assert_allclose(rows, [[0, 1], [0.5, 0.5], [1, 0]], atol=1e-300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, r"^num_steps: must be at least 1, found 0; "),
        ({"alpha_start": float("inf")}, r"^alpha_start: must be finite, found inf; "),
        ({"alpha_end": float("nan")}, r"^alpha_end: must be finite, found nan; "),
        ({"sizes": []}, r"^sizes: must hold at least one task, found none; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Annealed(**({"sizes": SIZES, "num_steps": 5} | arguments))
