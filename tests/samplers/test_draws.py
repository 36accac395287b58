from __future__ import annotations

import hashlib
import json
import time
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from mtl.samplers.draws import DeficitDraws, FixedMixture, checked_sizes

NUM_DRAWS = 10_000


def probability_families(num_tasks: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(num_tasks)
    families = {
        "equal": np.ones(num_tasks),
        "linear": np.arange(1.0, num_tasks + 1),
        "one dominates": np.array([1000.0] + [1.0] * (num_tasks - 1)),
        "skewed": generator.dirichlet(np.full(num_tasks, 0.2)) + 1e-9,
    }
    return {name: p / p.sum() for name, p in families.items()}


def cumulative_counts(draws: DeficitDraws, p: np.ndarray, num_draws: int) -> np.ndarray:
    return np.cumsum([draws.counts(p, 1) for _ in range(num_draws)], axis=0)


@pytest.mark.parametrize("num_tasks", [2, 3, 4, 5, 8, 16, 64, 256])
def test_counts_stay_within_tijdemans_bound(num_tasks: int) -> None:
    bound = 1 - 1 / (2 * num_tasks - 2)
    num_draws = NUM_DRAWS if num_tasks <= 8 else 3_000
    for name, p in probability_families(num_tasks).items():
        counts = cumulative_counts(DeficitDraws(num_tasks, seed=1), p, num_draws)
        expected = np.arange(1, num_draws + 1)[:, None] * p
        assert np.abs(counts - expected).max() <= bound + 1e-8, name


def test_256_tasks_stay_within_the_bound_over_10000_draws() -> None:
    p = probability_families(256)["skewed"]
    draws, counts = DeficitDraws(256), np.zeros(256)
    for num_drawn in range(50, NUM_DRAWS + 1, 50):
        counts += draws.counts(p, 50)
        assert np.abs(counts - num_drawn * p).max() <= 1 - 1 / 510 + 1e-8


def test_bound_holds_in_exact_arithmetic() -> None:
    generator = np.random.default_rng(0)
    for _ in range(40):
        num_tasks = int(generator.integers(2, 7))
        sizes = [int(size) for size in generator.integers(1, 30, num_tasks)]
        p = [Fraction(size, sum(sizes)) for size in sizes]
        draws, counts = DeficitDraws(num_tasks, seed=3), [0] * num_tasks
        for num_drawn in range(1, 301):
            counts = [a + b for a, b in zip(counts, draws.counts([float(x) for x in p], 1), strict=True)]
            deviation = max(abs(c - num_drawn * x) for c, x in zip(counts, p, strict=True))
            assert deviation <= 1 - Fraction(1, 2 * num_tasks - 2), (sizes, num_drawn)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1, 1 / 3, 1 / 7])
def test_two_tasks_on_the_border_of_eligibility(share: float) -> None:
    p = np.array([share, 1 - share])
    counts = cumulative_counts(DeficitDraws(2), p, NUM_DRAWS)
    assert np.abs(counts - np.arange(1, NUM_DRAWS + 1)[:, None] * p).max() <= 0.5 + 1e-8


def test_a_period_of_rational_probabilities_is_met_exactly() -> None:
    assert DeficitDraws(4).counts([0.4, 0.3, 0.2, 0.1], 1_000) == [400, 300, 200, 100]


def test_cutting_the_draws_into_calls_changes_nothing() -> None:
    p = probability_families(7)["skewed"]
    whole, cut = DeficitDraws(7, seed=5), DeficitDraws(7, seed=5)
    parts = np.sum([cut.counts(p, n) for n in (1, 0, 13, 50)], axis=0)
    assert whole.counts(p, 64) == parts.tolist()
    assert whole.state_dict() == cut.state_dict()


def test_single_task_gets_everything() -> None:
    assert DeficitDraws(1).counts([1.0], 17) == [17]


def test_task_of_probability_zero_is_never_drawn_even_when_owed() -> None:
    draws = DeficitDraws(3)
    owed = draws.counts([0.3, 0.3, 0.4], 1).index(0)
    p = [0.5, 0.5, 0.5]
    p[owed] = 0.0
    assert draws.counts(p, 1_000)[owed] == 0
    assert DeficitDraws(3).counts([0.0, 1.0, 0.0], 9) == [0, 9, 0]


def test_a_task_is_found_when_those_that_are_owed_may_not_be_drawn() -> None:
    draws = DeficitDraws(3)
    draws.load_state_dict({"order": [1, 0, 2], "deficits": [-0.375, -0.375, 0.75]})
    assert draws.counts([0.5, 0.5, 0.0], 1) == [0, 1, 0]  # both would have 0.125, less than q = 0.25


def test_denormal_probability_neither_warns_nor_breaks() -> None:
    assert DeficitDraws(3).counts([5e-324, 0.5, 0.5], 100) == [0, 50, 50]


def test_changing_probabilities_follow_their_running_sum() -> None:
    generator = np.random.default_rng(11)
    for num_tasks in (2, 3, 8, 32):
        draws, counts, expected = DeficitDraws(num_tasks), np.zeros(num_tasks), np.zeros(num_tasks)
        for _ in range(400):
            p = generator.dirichlet(np.ones(num_tasks))
            counts += draws.counts(p, 8)
            expected += 8 * p
            assert np.abs(counts - expected).max() < 1.5


def test_a_change_of_probabilities_does_not_forget_what_is_owed() -> None:
    draws = DeficitDraws(2)
    first = draws.counts([0.7, 0.3], 1)  # 0.7 and 0.3 examples are due, a whole one is given
    second = draws.counts([0.3, 0.7], 1)
    assert sorted([first, second]) == [[0, 1], [1, 0]]


def test_seed_only_orders_ties() -> None:
    firsts = {tuple(DeficitDraws(4, seed=seed).counts([0.25] * 4, 1)) for seed in range(40)}
    assert len(firsts) == 4
    assert {tuple(DeficitDraws(3, seed=seed).counts([0.5, 0.3, 0.2], 10)) for seed in range(20)} == {(5, 3, 2)}


def test_order_of_the_tasks_does_not_matter_without_ties() -> None:
    p = np.array([0.37, 0.05, 0.21, 0.37 - 0.03, 0.03])
    order = np.array([3, 0, 4, 2, 1])
    straight = cumulative_counts(DeficitDraws(5), p, 200)
    permuted = cumulative_counts(DeficitDraws(5), p[order], 200)
    np.testing.assert_array_equal(straight[:, order], permuted)


def test_state_survives_json_bitwise_and_carries_the_order_of_ties() -> None:
    p = probability_families(6)["equal"]
    draws = DeficitDraws(6, seed=1)
    draws.counts(p, 1_003)
    resumed = DeficitDraws(6, seed=2)
    resumed.load_state_dict(json.loads(json.dumps(draws.state_dict())))
    assert [draws.counts(p, 7) for _ in range(50)] == [resumed.counts(p, 7) for _ in range(50)]
    assert draws.state_dict() == resumed.state_dict()


def test_state_is_a_snapshot() -> None:
    draws = DeficitDraws(3)
    before = draws.state_dict()
    copy = json.loads(json.dumps(before))
    draws.counts([0.2, 0.3, 0.5], 1)
    assert before == copy
    assert draws.state_dict() != copy


def test_state_of_other_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="must have the run's 3 tasks, found 2"):
        DeficitDraws(3).load_state_dict(DeficitDraws(2).state_dict())


def test_draws_leave_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()
    DeficitDraws(5, seed=9).counts([0.2] * 5, 20)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize(
    ("num_tasks", "digest"),
    [
        (2, "a294d9bd7731382e"),
        (3, "47e82280b16cca59"),
        (8, "acb0c2d20e7b7b89"),
        (16, "6a87bb9719d711c1"),
        (64, "3bcc943d474d6f52"),
        (256, "26700a0fae68d11e"),
        (1024, "8f36caa048332e6c"),
    ],
)
def test_golden_draws(num_tasks: int, digest: str) -> None:
    """The same draws in every version, or a resumed run would go on with others."""
    index = np.arange(1.0, num_tasks + 1)
    found = hashlib.sha256()
    for p in (np.ones(num_tasks), index, index**2, np.where(index == 1, 1000.0, 1.0)):
        draws, p = DeficitDraws(num_tasks, seed=3), p / p.sum()
        for call in range(40):
            found.update(bytes(draws.counts(p if call % 4 else p[::-1], 16)))
    assert found.hexdigest()[:16] == digest


def test_drawing_64_of_1024_tasks_is_fast() -> None:
    p = probability_families(1024)["linear"]
    draws = DeficitDraws(1024)
    times = [time.perf_counter()]
    for _ in range(30):
        draws.counts(p, 64)
        times.append(time.perf_counter())
    assert min(b - a for a, b in pairwise(times)) < 0.002


def test_fixed_mixture_normalises() -> None:
    mixture = FixedMixture(np.array([3.0, 1.0]), seed=0)
    assert mixture.probabilities == (0.75, 0.25)
    assert mixture.counts(8) == [6, 2]


@pytest.mark.parametrize("sizes", [[], [3, 0], [-1]])
def test_sizes_without_examples_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^sizes: .*found .*; .*add"):
        checked_sizes(sizes)
