from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from scipy.stats import norm, permutation_test, rankdata

from mtl.evaluation.resampling import SufficientStatistics, resampled_scores, sufficient_statistics
from mtl.evaluation.statistics import (
    NUM_RESAMPLES,
    holm,
    mean_over_seeds,
    mean_ranks,
    pareto_front,
    percentile_interval,
    relative_change,
    resample_examples,
    resample_seeds,
    sign_flip_p,
    two_sided_p,
)

RATIO = sufficient_statistics("accuracy", ["a"], ["a"], [1.0]).score
BLEU = sufficient_statistics("bleu", ["a"], ["a"], [1.0]).score


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def correlated_answers(rng, num_examples):
    """Right or wrong answers of two systems, right in 70 and 60 % of examples, mostly of the same ones."""
    shared, own_a, own_b = rng.normal(size=(3, num_examples))
    ones = np.ones(num_examples)
    return [
        np.stack([np.sqrt(0.6) * shared + np.sqrt(0.4) * own < norm.ppf(share), ones], axis=1)
        for own, share in ((own_a, 0.7), (own_b, 0.6))
    ]


LENGTHS, EASE = np.arange(6, 30), np.array([0.6, 0.75, 0.9])
ORDERS = np.arange(4)


def translations(rng, num_examples):
    """n-gram counts of two systems on sentences of random length and difficulty."""
    references = rng.choice(LENGTHS, size=num_examples)
    ease = rng.choice(EASE, size=num_examples)
    counts = []
    for skill in (1.0, 0.9):
        lengths = references - rng.integers(0, 3, size=num_examples)
        totals = lengths[:, None] - ORDERS
        matches = rng.binomial(totals, (skill * ease)[:, None] ** (1 + ORDERS / 2))
        counts.append(np.column_stack([lengths, references, matches, totals]).astype(float))
    return counts


def expected_bleu(skill):
    totals = LENGTHS.mean() - 1 - ORDERS
    matches = totals * (skill * EASE[:, None]) ** (1 + ORDERS / 2)
    return BLEU(np.concatenate([[LENGTHS.mean() - 1, LENGTHS.mean()], matches.mean(axis=0), totals]))


PROBLEMS = {
    "accuracy": (correlated_answers, RATIO, 0.7 - 0.6),
    "bleu": (translations, BLEU, expected_bleu(1.0) - expected_bleu(0.9)),
}


def coverage(rng, problem, num_examples, num_repetitions):
    """Share of repetitions whose interval of the difference holds the true one. Ten share their resamples."""
    generate, score, truth = PROBLEMS[problem]
    covered = []
    for _ in range(num_repetitions // 10):
        pairs = [generate(rng, num_examples) for _ in range(10)]
        systems = [SufficientStatistics(values, score) for pair in pairs for values in pair]
        scores_RA = resampled_scores(resample_examples(num_examples, rng), systems)
        for i in range(0, 20, 2):
            low, high = percentile_interval(scores_RA[:, i] - scores_RA[:, i + 1])
            covered.append(low <= truth <= high)
    return np.mean(covered)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_intervals_of_a_difference_cover_it(rng, problem):
    assert coverage(rng, problem, 200, 500) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("num_examples", "expected"), [(30, 0.935), (50, 0.942), (200, 0.953)])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_intervals_of_a_difference_cover_it_with_few_examples(rng, problem, num_examples, expected):
    """The table of the module."""
    assert coverage(rng, problem, num_examples, 4000) == pytest.approx(expected, abs=0.01)


def seeds_difference(rng, spread, num_seeds):
    """Interval of a difference whose expectation is 0, for a spread over seeds in units of a run's standard error."""
    examples_NS = rng.normal(size=(50, 1)) + rng.normal(size=(50, num_seeds))
    seeds_S = spread * np.sqrt(2 / 50) * rng.normal(size=num_seeds)
    scores_RS = resample_examples(50, rng) @ examples_NS / 49 + seeds_S
    return percentile_interval(mean_over_seeds(scores_RS, resample_seeds(num_seeds, rng)))


@pytest.mark.parametrize(("num_seeds", "spread", "expected"), [(1, 1, 0.84), (3, 1, 0.96), (3, 5, 0.83), (10, 5, 0.92)])
def test_what_seeds_support(rng, num_seeds, spread, expected):
    """The table of ``resample_seeds``."""
    intervals = [seeds_difference(rng, spread, num_seeds) for _ in range(300)]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(expected, abs=0.04)


def test_resamples_of_examples_and_seeds(rng):
    counts_RN = resample_examples(7, rng, 2000)
    assert set(counts_RN.sum(axis=1)) == {6}
    assert counts_RN.mean(axis=0) == pytest.approx(6 / 7, abs=0.08)
    # Unbiased: the variance over resamples of the mean is s^2 / n, not (n - 1) / n of it.
    values = np.array([0.0, 1, 1, 2, 3, 5, 8])
    assert (counts_RN @ values / 6).var() == pytest.approx(values.var(ddof=1) / 7, rel=0.08)
    assert (
        resample_examples(7, np.random.default_rng(5)).tolist()
        == resample_examples(7, np.random.default_rng(5)).tolist()
    )


def test_one_seed_gives_the_plain_bootstrap(rng):
    scores_R1 = rng.normal(size=(99, 1))
    counts_R1 = resample_seeds(1, rng, 99)
    assert mean_over_seeds(scores_R1, counts_R1).tolist() == scores_R1[:, 0].tolist()


def test_pairs_of_seeds_are_kept(rng):
    """Two systems that differ by .1 with every seed differ by .1 in every resample, however far the seeds lie apart."""
    scores_RS = rng.normal(size=(1, 3)) + np.zeros((99, 1))
    counts_RS = resample_seeds(3, rng, 99)
    differences = mean_over_seeds(scores_RS + 0.1, counts_RS) - mean_over_seeds(scores_RS, counts_RS)
    assert differences == pytest.approx(0.1)
    assert mean_over_seeds(scores_RS, counts_RS).std() > 0.1


def test_interval_is_of_order_statistics():
    assert percentile_interval(np.random.default_rng(0).permutation(np.arange(1.0, 1000))) == (25, 975)


def test_interval_and_p_agree(rng):
    decided = []
    for num_beyond in rng.integers(15, 35, size=200):
        resamples = rng.choice([-1, 1]) * rng.integers(1, 9, size=NUM_RESAMPLES) / 30
        resamples[:num_beyond] *= rng.choice([-1, 0])
        resamples += rng.normal(scale=1e-16, size=NUM_RESAMPLES)  # rounding must not decide
        low, high = percentile_interval(resamples)
        decided.append(two_sided_p(resamples) <= 0.05)
        assert decided[-1] == (low > 0 or high < 0)
    assert 50 < sum(decided) < 150
    # 24 of 999 resamples on the other side decide, 25 do not; 0 itself is on both sides.
    for num_zero, expected in ((24, True), (25, False)):
        resamples = np.where(np.arange(999) < num_zero, 0.0, 1.0)
        assert (two_sided_p(resamples) <= 0.05) == expected == (percentile_interval(resamples).low > 0)


def test_two_sided_p():
    assert two_sided_p(np.ones(999)) == two_sided_p(-np.ones(999)) == 2 / 1000
    assert two_sided_p(np.zeros(999)) == 1
    assert two_sided_p(np.array([-1.0, 1, 1, 1, 1, 1, 1, 1, 1])) == 0.4
    assert np.isnan(two_sided_p(np.array([1.0, np.nan])))


def test_equal_systems_do_not_differ(rng):
    """Also where their sums are rounded differently, as they are in other columns of a matrix product."""
    systems = [sufficient_statistics("accuracy", [""] * 50, [""] * 50, rng.random(50))] * 2
    scores_RA = resampled_scores(resample_examples(50, rng), systems)
    differences = scores_RA[:, 0] - scores_RA[:, 1] + 1e-16
    assert percentile_interval(differences) == (0, 0)
    assert two_sided_p(differences) == 1


def test_an_interval_of_nan_is_nan():
    assert np.isnan(percentile_interval(np.array([1.0, np.nan, 2]))).all()


@pytest.mark.parametrize(
    ("num_seeds", "expected"), [(1, 1), (2, 0.5), (3, 0.25), (4, 0.125), (5, 0.0625), (6, 0.03125)]
)
def test_smallest_p_of_sign_flips(rng, num_seeds, expected):
    assert sign_flip_p([0.1, 0.2, 0.3, 0.1, 0.2, 0.3][:num_seeds], rng) == expected


@pytest.mark.parametrize("num_seeds", [2, 5, 8])
def test_sign_flips_equal_scipy(rng, num_seeds):
    for _ in range(20):
        differences = rng.normal(loc=0.5, size=num_seeds).round(1)  # ties occur
        expected = permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        ).pvalue
        distances = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=num_seeds)]
        by_hand = np.mean(np.array(distances) >= abs(differences.sum()) - 1e-9)
        assert sign_flip_p(differences, rng) == by_hand
        assert by_hand == pytest.approx(min(1, expected))


def test_many_seeds_are_sampled(rng):
    differences = rng.normal(loc=0.4, size=17)
    signs = 1 - 2 * (np.arange(2**17)[:, None] >> np.arange(17) & 1)
    exact = np.mean(abs(signs @ differences) >= abs(differences.sum()) - 1e-9)
    assert sign_flip_p(differences, rng) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(np.ones(40), rng) == 1 / 10000  # never 0


def test_sign_flips_of_nothing(rng):
    assert sign_flip_p([0, 0, 0], rng) == 1
    assert np.isnan(sign_flip_p([0.1, np.nan], rng))


def test_holm():
    # Ordered .005, .01, .03, .04 times 4, 3, 2, 1; the last may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([0.03]).tolist() == [0.03]
    np.testing.assert_allclose(holm([np.nan, 0.02, 0.5]), [np.nan, 0.04, 0.5])


def test_relative_change_worked_example():
    """Delta of LibMTL's ``count_improvement``: task A has two metrics, of which lower is better in the second."""
    task_a = relative_change([93, 99], [96, 98], [True, False])
    task_b = relative_change([0.5], [0.2])
    assert task_a == pytest.approx([-0.03125, -1 / 98])
    assert np.mean([task_a.mean(), task_b.mean()]) == pytest.approx(0.7396364796, abs=5e-11)


def test_relative_change_of_extremes():
    assert relative_change([0.06, 0.05, 0, 0], [0, 0.01, 0.05, 0]) == pytest.approx([1.2, 0.8, -1, 0])
    assert relative_change(-1.0, -2.0) == 0.5  # better, though the reference is negative
    assert relative_change(1.5, 2.0, higher_is_better=False) == 0.25
    assert relative_change(np.ones((5, 3)), np.full(3, 2.0), [True, False, True]).shape == (5, 3)
    assert np.isnan(relative_change(np.nan, 0.5))


def test_mean_ranks(rng):
    assert mean_ranks([[0.9, 0.2], [0.5, 0.2], [0.5, 0.8]]).tolist() == [(1 + 2.5) / 2, (2.5 + 2.5) / 2, (2.5 + 1) / 2]
    assert mean_ranks([[0.9, 1.0], [0.5, 2.0]], [True, False]).tolist() == [1, 2]
    scores = rng.integers(0, 5, size=(9, 6)) / 10
    assert mean_ranks(scores) == pytest.approx(rankdata(-scores, axis=0).mean(axis=1))
    assert mean_ranks([[0.1 + 0.2], [0.3]]).tolist() == [1.5, 1.5]
    assert mean_ranks([[0.4, 0.7]]).tolist() == [1]
    np.testing.assert_array_equal(mean_ranks([[0.4, np.nan], [0.5, 0.1], [0.3, 0.2]]), [np.nan, 1.5, 2])


def test_pareto_front():
    points = [(1, 3), (2, 2), (3, 1), (2, 2), (1, 2), (2, 1), (np.nan, 9)]
    assert pareto_front(points).tolist() == [True, True, True, True, False, False, False]
    assert pareto_front([(0.1 + 0.2, 1), (0.3, 1)]).tolist() == [True, True]
    assert pareto_front([(0, 0)]).tolist() == [True]


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_equals_pairwise_definition(seed):
    points = np.random.default_rng(seed).integers(0, 6, size=(15, 2))
    beaten = [any((q >= p).all() and (q > p).any() for q in points) for p in points]
    assert pareto_front(points).tolist() == [not b for b in beaten]


def test_200_runs_of_10_tasks_are_resampled_in_seconds(rng):
    values = rng.integers(1, 20, size=(200, 200, 10)).astype(float)
    systems = [SufficientStatistics(values_NK, BLEU) for values_NK in values]
    start = time.process_time()
    scores_RA = resampled_scores(resample_examples(200, rng), systems)
    intervals = [percentile_interval(scores_R) for scores_R in scores_RA.T]
    assert (time.process_time() - start) * 10 < 15  # about 3 where nothing else runs
    assert len(intervals) == 200
