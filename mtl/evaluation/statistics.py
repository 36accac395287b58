"""How sure one can be of a difference between systems, and how well a system does over many tasks.

The bootstrap here is paired (Koehn, EMNLP 2004; Berg-Kirkpatrick et al., EMNLP 2012): all systems of a task are scored
on the same resampled examples, so that what makes an example hard for all of them cancels in their difference. It is
hierarchical: seeds are resampled around the examples. A quantity (a score, a difference, a mean of relative changes
over tasks) is computed from every resample as from the data themselves; :func:`percentile_interval` and
:func:`two_sided_p` then judge its R values.

Of n items, n - 1 are drawn with replacement, not n: the variance of a mean over resamples is then unbiased, where that
of the plain bootstrap is (n - 1) / n of it, two thirds for three seeds (Rao and Wu, JASA 1988). How often intervals of
nominal 95 % cover a known difference of two systems, measured on 10,000 test sets:

========  =====================  ============  =================  ============
examples  accuracy, n - 1 draws  with n draws  BLEU, n - 1 draws  with n draws
========  =====================  ============  =================  ============
30        93.3 %                 92.6 %        93.7 %             93.3 %
50        94.0 %                 93.7 %        94.4 %             94.1 %
200       95.1 %                 95.1 %        95.5 %             95.3 %
========  =====================  ============  =================  ============

Correcting bias and skewness (BCa; Efron, JASA 1987) covered less with 30 and 50 examples.

Shape suffixes: N examples, R resamples, S seeds, T tasks, A systems.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

NUM_RESAMPLES = 999  # .025 (R + 1) is a whole number, so that interval and p agree exactly (Davison and Hinkley, 1997)
REFERENCE_FLOOR = 0.05
MAX_EXACT_SEEDS = 16
DECIMALS = 12  # what agrees so far is equal: a sum's last digits depend on the order of its terms


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


def resample_examples(num_examples: int, rng: np.random.Generator, num_resamples: int = NUM_RESAMPLES) -> Counts:
    """How often each example is in each resample [R, N]; a row sums to N - 1. Of one, none is drawn."""
    return rng.multinomial(num_examples - 1, np.full(num_examples, 1 / num_examples), size=num_resamples)


def resample_seeds(num_seeds: int, rng: np.random.Generator, num_resamples: int = NUM_RESAMPLES) -> Counts:
    """How often each seed is in each resample [R, S], to be used for all tasks and for both systems of a pair.

    One seed is in all resamples once: the bootstrap is then the plain one over examples, and its intervals say nothing
    of how another seed would have turned out. Few seeds say little of it. Let ``q`` be the spread of the difference
    over seeds divided by the standard error that the examples alone give a run's difference; with seeds and examples
    interacting as much as the examples vary, nominal 95 % intervals of the expected difference cover it in

    ======  =====  =====  =====  =====
    seeds   q = 0  q = 1  q = 2  q = 5
    ======  =====  =====  =====  =====
    1        94 %   84 %   62 %   28 %
    2        98 %   94 %   87 %   72 %
    3        98 %   96 %   93 %   83 %
    5        97 %   96 %   94 %   89 %
    10       97 %   97 %   96 %   92 %
    ======  =====  =====  =====  =====

    So three seeds do where most of the uncertainty comes from the examples, and not where it comes from the seeds.
    """
    if num_seeds == 1:
        return np.ones((num_resamples, 1), dtype=np.int64)
    return resample_examples(num_seeds, rng, num_resamples)


def mean_over_seeds(values_RS: Floats, counts_RS: Counts) -> Floats:
    """The mean over the seeds of each resample [R]; for a pair of systems, of their differences seed by seed."""
    return np.asarray((values_RS * counts_RS).sum(axis=1) / counts_RS.sum(axis=1))


def percentile_interval(values_R: Floats) -> Interval:
    """The middle 95 % of a resampled quantity (Efron, 1979); NaN where a value is.

    The ends are the order statistics .025 (R + 1) and .975 (R + 1). Where all examples score the same, it has no width:
    a bootstrap cannot know of what it has not seen.
    """
    low, high = _rounded(np.quantile(values_R, [0.025, 0.975], method="weibull"))
    return Interval(float(low), float(high))


def two_sided_p(differences_R: Floats) -> float:
    """``2 (k + 1) / (R + 1)`` with k the resamples on the rarer side of 0, those on 0 included; at most 1, NaN for NaN.

    With 999 resamples it is at most .05 exactly where :func:`percentile_interval` excludes 0. The + 1 counts the data
    themselves as a resample (Davison and Hinkley, 1997). Berg-Kirkpatrick et al. count the resamples beyond twice the
    observed difference instead, which is the same where the resamples lie symmetrically about it.
    """
    if np.isnan(differences_R).any():
        return float("nan")
    rounded_R = _rounded(differences_R)
    rarer = min((rounded_R <= 0).sum(), (rounded_R >= 0).sum())
    return min(1.0, 2 * (int(rarer) + 1) / (len(rounded_R) + 1))


def sign_flip_p(differences_S: ArrayLike, rng: np.random.Generator, num_samples: int = 9999) -> float:
    """Two-sided p of the paired sign-flip test over seeds (Fisher, 1935; Pitman, 1937); NaN where a difference is.

    It is the share of all ``2^S`` assignments of signs whose sum is at least as far from 0 as the observed one: exact
    if the differences are symmetric about 0 under the null hypothesis. It cannot fall below ``2 / 2^S``: .25 for 3
    seeds, .0625 for 5; only 6 reach .05. Above 16 seeds the assignments are sampled and the observed one is added.

    Args:
        differences_S: Difference of the two systems for each seed [S].
        rng: Draws the assignments above 16 seeds.
        num_samples: How many.
    """
    differences = np.asarray(differences_S, dtype=np.float64)
    if np.isnan(differences).any():
        return float("nan")
    num_seeds = len(differences)
    if num_seeds <= MAX_EXACT_SEEDS:
        negative = np.arange(2**num_seeds)[:, None] >> np.arange(num_seeds) & 1
    else:
        negative = rng.integers(2, size=(num_samples + 1, num_seeds))
        negative[0] = 0
    distances = _rounded(np.abs((1 - 2 * negative) @ differences))
    return float((distances >= distances[0]).mean())


def holm(p_values_T: ArrayLike) -> Floats:
    """p-values adjusted for the number of tasks [T]: rejecting those below alpha errs in any task with at most alpha.

    Source: Holm, Scandinavian Journal of Statistics 1979. A NaN stays and does not count as a test.
    """
    adjusted = np.array(p_values_T, dtype=np.float64)
    order = np.argsort(adjusted)[: np.count_nonzero(~np.isnan(adjusted))]  # NaN is sorted last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * adjusted[order]))
    return adjusted


def relative_change(new: ArrayLike, reference: ArrayLike, higher_is_better: ArrayLike = True) -> Floats:
    """``(new - reference) / max(|reference|, .05)``, negated where lower is better, so that above 0 is better.

    Its mean over tasks is the Delta_m of Maninis et al. (CVPR 2019), as a fraction. Two deviations: the absolute value
    keeps the sign for a negative reference, and the floor keeps a task whose reference is near 0 from outweighing all
    others. All arguments broadcast.
    """
    new, reference = np.asarray(new, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    change = (new - reference) / np.maximum(np.abs(reference), REFERENCE_FLOOR)
    return np.asarray(np.where(higher_is_better, change, -change))


def mean_ranks(scores_AT: ArrayLike, higher_is_better: ArrayLike = True) -> Floats:
    """Mean over tasks of each system's rank [A]: 1 is best, equals share the mean of their ranks.

    A rank depends on which systems are compared. A system without a score (NaN) in a task has the mean rank NaN, and
    the others are ranked there without it.

    Args:
        scores_AT: Score of each system in each task.
        higher_is_better: For all tasks, or for each [T].
    """
    scores = _rounded(scores_AT)
    scores = np.where(higher_is_better, scores, -scores)
    num_better = (scores[None] > scores[:, None]).sum(axis=1)
    num_equal = (scores[None] == scores[:, None]).sum(axis=1)
    ranks_AT = num_better + (num_equal + 1) / 2
    return np.asarray(np.where(np.isnan(scores), np.nan, ranks_AT).mean(axis=1))


def pareto_front(points_AD: ArrayLike) -> NDArray[np.bool_]:
    """Which points [A] no other point beats: none is at least as high in all D values and higher in one.

    Equal points are on the front together; a point with NaN is not on it.
    """
    points = _rounded(points_AD)
    at_least = (points[None] >= points[:, None]).all(axis=2)
    higher = (points[None] > points[:, None]).any(axis=2)
    return np.asarray(~np.any(at_least & higher, axis=1) & ~np.any(np.isnan(points), axis=1))


def _rounded(values: ArrayLike) -> Floats:
    return np.asarray(np.round(np.asarray(values, dtype=np.float64), DECIMALS))
