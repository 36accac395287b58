"""The worst task's gain near the mean gradient. Shape suffixes: M present tasks, K rows that are not 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mtl.surgery.cosine_space import CosineSpace
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.nonnegative import nonnegative_qp
from mtl.surgery.scale import Scale, check_scale

MAX_STEPS = 200
# A shorter mean, as a share of what its parts' lengths add up to, is rounding of the Gramian.
ROUNDING = 1e-8


class CAGrad(GramianSurgery):
    """``d = argmax min_i <g_i, d>`` subject to ``|d - g_0| <= c |g_0|``: the best for the worst task near the mean.

    ``c = 0`` is the mean; at ``c >= 1`` no task is hurt. Solved exactly by its level: the d nearest to ``g_0`` with
    ``<g_i, d> >= m`` for all i moves away from it as m grows, and m is the root of ``|d(m) - g_0| = c |g_0|``.

    Source: Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, Eq. 2 and 4.

    Args:
        c: Radius around the mean, as a share of its norm; at least 0.
        scale: ``"mean"`` divides by ``1 + c``, so that equal rows give that row; ``"paper"`` does not.

    Raises:
        ValueError: If c is negative or not finite, or the scale is another word.
    """

    weights_act = "partly"

    def __init__(self, c: float = 0.5, scale: Scale = "mean") -> None:
        if not 0 <= c < math.inf:
            raise ValueError(f"c: must be at least 0 and finite, found {c}; 0.5 is usual, 0 is the mean")
        check_scale(scale)
        self._c = c
        self._scale = scale

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        space = CosineSpace.of(gramian_MM)
        mean_K = space.norms_K / space.num_rows  # of the unit rows
        mean_length = length(space, mean_K)
        radius = self._c * mean_length if mean_length > ROUNDING * mean_K.sum() else 0.0
        added_K = farthest(space, mean_K, radius) if radius > 0 else np.zeros_like(mean_K)
        coefficients_K = (mean_K + added_K) / space.norms_K
        return space.all_rows(coefficients_K / (1 + self._c) if self._scale == "mean" else coefficients_K)


def length(space: CosineSpace, x_K: NDArray[np.float64]) -> float:
    """Of a combination of the unit rows."""
    return math.sqrt(max(float(x_K @ space.cosines_KK @ x_K), 0.0))


def farthest(space: CosineSpace, mean_K: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """What to add to the mean's coefficients of the unit rows, for the highest level within the radius.

    At level m, ``x(m) = argmin x^T C x / 2 - ((m - b) / |g|)^T x`` over ``x >= 0``, with ``b_i = <g_i, g_0>``; it has
    the length ``sqrt(x^T C x)`` of the step away from the mean. While the same x are above 0, x is linear in m, and the
    root of a quadratic gives the level of a length: a step of Newton's method. Bisection holds it in its bracket.
    """
    inverse_K = 1 / space.norms_K
    inner_K = space.norms_K * (space.cosines_KK @ mean_K)  # b

    def step_of(level: float) -> tuple[NDArray[np.float64], float]:
        x_K = nonnegative_qp(space.cosines_KK, (level - inner_K) * inverse_K, stop_below=-2 * radius**2)
        objective = x_K @ (space.cosines_KK @ x_K / 2 - (level - inner_K) * inverse_K)
        # At the solution the objective is -length^2 / 2, and never below where the solver stopped early.
        return x_K, math.sqrt(max(-2 * float(objective), 0.0))

    low, high = float(inner_K.min()), float((inner_K + space.norms_K * radius).min())
    smallest_bracket = 1e-12 * max(abs(low), abs(high))
    best_K = np.zeros_like(mean_K)
    level = high
    for _ in range(MAX_STEPS):
        x_K, distance = step_of(level)
        reached = abs(distance - radius) <= 1e-14 * radius
        if distance <= radius or reached:
            low, best_K = level, x_K
        else:
            high = level
        if reached or high - low <= smallest_bracket:
            break
        guess = level_of_length(space, x_K, inner_K, radius)
        level = guess if guess is not None and low < guess < high else (low + high) / 2
    distance = length(space, best_K)
    # A distance far from the radius is where no step gains more, as from c = 1 on at a Pareto-stationary point.
    return best_K * (radius / distance) if abs(distance - radius) <= 1e-6 * radius else best_K


@np.errstate(over="ignore", invalid="ignore")  # norms more than 150 decades apart are left to the bisection
def level_of_length(
    space: CosineSpace, x_K: NDArray[np.float64], inner_K: NDArray[np.float64], radius: float
) -> float | None:
    """The level at which x, with the same ones above 0, has the length ``radius``; ``None`` if there is none."""
    (active,) = np.nonzero(x_K > 0)
    if not len(active):
        return None
    inverse_A, inner_A = 1 / space.norms_K[active], inner_K[active]
    cosines_AA = space.cosines_KK[np.ix_(active, active)]
    slope_A, offset_A = np.linalg.lstsq(cosines_AA, np.stack([inverse_A, inner_A * inverse_A], axis=1), rcond=None)[0].T
    a = slope_A @ cosines_AA @ slope_A
    b = slope_A @ cosines_AA @ offset_A
    c = offset_A @ cosines_AA @ offset_A - radius**2
    if not a > 0 or b * b < a * c:
        return None
    return float((b + math.sqrt(b * b - a * c)) / a)
