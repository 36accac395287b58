"""Proportional, equal and temperature sampling."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mtl.interfaces import TaskFeedback, TaskSampler
from mtl.samplers import Equal, Proportional, Temperature

SIZES = [100, 1_000, 10_000, 100_000]
FACTORIES = {
    "proportional": lambda seed=0: Proportional(SIZES, seed=seed),
    "equal": lambda seed=0: Equal(SIZES, seed=seed),
    "temperature": lambda seed=0: Temperature(SIZES, temperature=2.0, seed=seed),
}


@pytest.mark.parametrize(
    ("temperature", "max_size", "golden"),
    [
        (2.0, None, (0.021841, 0.069068, 0.218412, 0.690679)),
        (1 / 0.3, None, (0.067026, 0.133734, 0.266835, 0.532405)),
        (1.0, 5_000, (0.009009, 0.09009, 0.45045, 0.45045)),
    ],
)
def test_golden_temperatures(temperature: float, max_size: int | None, golden: tuple[float, ...]) -> None:
    p = Temperature(SIZES, temperature=temperature, max_size=max_size).probabilities
    np.testing.assert_allclose(p, golden, atol=6e-7)


def test_temperature_1_is_proportional_and_infinity_is_equal() -> None:
    np.testing.assert_allclose(
        Temperature(SIZES, temperature=1.0).probabilities, Proportional(SIZES).probabilities, rtol=1e-13
    )
    assert Temperature(SIZES, temperature=float("inf")).probabilities == Equal(SIZES).probabilities == (0.25,) * 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_ratio_of_probabilities_is_the_tempered_ratio_of_sizes(temperature: float) -> None:
    p = Temperature([7, 300, 41], temperature=temperature).probabilities
    assert sum(p) == pytest.approx(1, abs=1e-15)
    assert p[1] / p[0] == pytest.approx((300 / 7) ** (1 / temperature), rel=1e-12)
    assert p[0] < p[2] < p[1]


def test_cap_below_every_size_is_equal_and_applies_before_the_exponent() -> None:
    assert Temperature(SIZES, max_size=100).probabilities == (0.25,) * 4
    p = Temperature([100, 10_000], temperature=2.0, max_size=400).probabilities
    assert p[1] / p[0] == pytest.approx(2.0)


def test_extreme_sizes_and_temperatures_stay_finite() -> None:
    for temperature in (1e-3, 1e-300, 1e300):
        p = Temperature([20, 40_000, 10**12], temperature=temperature).probabilities
        assert np.isfinite(p).all()
        assert sum(p) == pytest.approx(1)
    assert Temperature([20, 40_000], temperature=1e-3).counts(64) == [0, 64]


def test_a_tiny_task_beside_a_huge_one_gets_its_share() -> None:
    sampler = Proportional([20, 40_000])
    counts = np.sum([sampler.counts(16) for _ in range(40_020 // 16)], axis=0)
    assert abs(counts[0] - 16 * (40_020 // 16) * 20 / 40_020) <= 0.5 + 1e-8


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_not_above_0_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^temperature: must be above 0, found .*; 1 is proportional"):
        Temperature(SIZES, temperature=temperature)


def test_cap_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_size: must be at least 1 example, found 0; null means no cap$"):
        Temperature(SIZES, max_size=0)


@pytest.mark.parametrize("sampler", [Proportional, Equal, Temperature])
def test_task_without_examples_is_refused(sampler: Callable[[list[int]], TaskSampler]) -> None:
    with pytest.raises(ValueError, match=r"^sizes: every task must have an example, found 0 at index 1; add rows"):
        sampler([10, 0])


@pytest.mark.parametrize("name", FACTORIES)
def test_counts_sum_to_the_batch_and_follow_p(name: str) -> None:
    sampler = FACTORIES[name]()
    counts = np.array([sampler.counts(16) for _ in range(200)])
    assert (counts.sum(axis=1) == 16).all()
    assert np.abs(counts.sum(axis=0) - 3_200 * np.array(sampler.probabilities)).max() <= 1 - 1 / 6 + 1e-8


@pytest.mark.parametrize("name", FACTORIES)
def test_state_round_trips_bitwise(name: str) -> None:
    sampler, resumed = FACTORIES[name](), FACTORIES[name](seed=4)
    for _ in range(33):
        sampler.counts(5)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert [sampler.counts(3) for _ in range(40)] == [resumed.counts(3) for _ in range(40)]


@pytest.mark.parametrize("name", FACTORIES)
def test_feedback_changes_nothing(name: str) -> None:
    sampler = FACTORIES[name]()
    before = sampler.probabilities, sampler.state_dict()
    sampler.update(
        TaskFeedback(0, [0, 2], [1, 1], torch.tensor([5.0, 1.0]), validation={1: {"loss": 1.0, "score": 0.0}})
    )
    assert (sampler.probabilities, sampler.state_dict()) == before
