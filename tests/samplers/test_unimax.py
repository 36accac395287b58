from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtl.samplers import Equal, Proportional, UniMax

SIZES = [100, 1_000, 10_000, 100_000]


def test_golden_of_five_languages() -> None:
    """Characters of Swedish, Persian, Ekegusii, Icelandic and Faroese as in the package unimax-sampling."""
    characters = [179955884499, 184595788282, 42541080893, 10027573389, 549707867]
    p = UniMax(characters, budget=250e9, max_epochs=4).probabilities
    np.testing.assert_allclose(
        p, [0.276921166635, 0.276921166635, 0.276921166635, 0.160441174224, 0.008795325872], atol=6e-13
    )


@pytest.mark.parametrize("budget", [50, 3_000, 30_000, 200_000])
@pytest.mark.parametrize("max_epochs", [0.5, 1, 4])
def test_no_task_is_repeated_more_than_the_cap_and_the_others_are_alike(budget: float, max_epochs: float) -> None:
    p = np.array(UniMax(SIZES, budget=budget, max_epochs=max_epochs).probabilities)
    used = p * min(budget, max_epochs * sum(SIZES))
    caps = max_epochs * np.array(SIZES)
    assert (used <= caps * (1 + 1e-12)).all()
    uncapped = used < caps * (1 - 1e-9)
    if uncapped.any():
        np.testing.assert_allclose(used[uncapped], used.max(), rtol=1e-12)
        assert used.sum() == pytest.approx(budget, rel=1e-12)


def test_a_small_budget_is_equal_and_a_large_one_proportional() -> None:
    np.testing.assert_allclose(UniMax(SIZES, budget=400, max_epochs=1).probabilities, Equal(SIZES).probabilities)
    for budget in (4 * sum(SIZES), 1e9):
        np.testing.assert_allclose(UniMax(SIZES, budget=budget).probabilities, Proportional(SIZES).probabilities)


def test_a_permutation_of_the_sizes_permutes_the_probabilities() -> None:
    order = [2, 0, 3, 1]
    straight = UniMax(SIZES, budget=30_000).probabilities
    permuted = UniMax([SIZES[task] for task in order], budget=30_000).probabilities
    np.testing.assert_allclose(np.array(straight)[order], permuted, rtol=1e-12)


def test_the_budget_of_a_run_is_its_number_of_examples() -> None:
    by_run = UniMax(SIZES, max_epochs=2, num_steps=500, batch_size=16)
    assert by_run.probabilities == UniMax(SIZES, budget=8_000, max_epochs=2).probabilities
    assert by_run.probabilities != UniMax(SIZES, budget=9_000, max_epochs=2).probabilities
    counts = np.sum([by_run.counts(16) for _ in range(500)], axis=0)
    assert abs(counts[0] - 200) <= 1  # two epochs of 100


def test_a_single_task() -> None:
    assert UniMax([7], budget=1e6).probabilities == (1.0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"^budget: must be given where num_steps and batch_size are not, found None; pass it$"),
        ({"num_steps": 5}, r"^budget: must be given where num_steps and batch_size are not, found None; "),
        ({"budget": 0}, r"^budget: must be above 0 and finite, found 0; "),
        ({"budget": float("nan")}, r"^budget: must be above 0 and finite, found nan; "),
        ({"budget": 10, "max_epochs": 0}, r"^max_epochs: must be above 0 and finite, found 0; "),
        ({"budget": 10, "sizes": [1, 0]}, r"^sizes: every task must have an example, found 0 at index 1; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniMax(**({"sizes": SIZES} | arguments))
