"""Fair gains for all tasks. Shape suffixes: M present tasks, K rows that are not 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mtl.surgery.cosine_space import CosineSpace
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.scale import Scale, check_scale, with_mean_norm

MAX_STEPS = 200
PRECISION = 1e-13
# Without a solution (some combination of the rows is 0) the iterates grow without end, and the gains that belong to
# them shrink. Below this share of the iterates' sum the rounding of the cosines hides them.
RESOLVED = 1e-15
# Near such a point rounding limits the residual; above this the rows' gains may not even be positive.
STATIONARY = 0.1
EPSILON = float(np.finfo(np.float64).eps)


class FairGrad(GramianSurgery):
    """``(G w)_i = w_i ** (-1 / alpha)`` with ``w > 0``: the alpha-fair division of the gain ``<g_i, d>`` of each task.

    ``alpha = 1`` is proportional fairness (Nash-MTL), larger values go towards the best for the worst task. Every task
    gains. No solution exists at a Pareto-stationary point, where the result is 0.

    Solved exactly by Newton's method on a convex function of the coefficients x of the unit rows, whose minimum has
    ``(C x)_i = |g_i| ** (1 / alpha - 1) x_i ** (-1 / alpha)``.

    Source: Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, Eq. 4 and 8.

    Args:
        alpha: Fairness, above 0.
        scale: ``"mean"`` gives the result the norm of the mean row, so that equal rows give that row; ``"paper"``
            leaves the norm that solves the equations.

    Raises:
        ValueError: If alpha is not above 0 and finite, or the scale is another word.
    """

    def __init__(self, alpha: float = 2.0, scale: Scale = "mean") -> None:
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha: must be above 0 and finite, found {alpha}; 1 is Nash-MTL, 2 is usual")
        check_scale(scale)
        self._alpha = alpha
        self._scale = scale
        self.weights_act = "no" if alpha == 1 else "partly" if alpha < 1 else "reversed"

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        space = CosineSpace.of(gramian_MM)
        weights_K = fair(space.cosines_KK, space.norms_K, self._alpha) / space.norms_K
        if self._scale == "mean":
            # A row of 0 counts in the mean.
            share = len(space.kept) / space.num_rows
            return space.all_rows(share * with_mean_norm(weights_K, space.gramian_KK))
        # The equations have another unit than the rows: w scales as their norm to the power of -2 alpha / (1 + alpha).
        return space.all_rows(weights_K * (space.unit or 1.0) ** (-2 * self._alpha / (1 + self._alpha)))


@np.errstate(over="ignore", invalid="ignore")  # norms more than 150 decades apart end as without a solution
def fair(cosines_KK: NDArray[np.float64], norms_K: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """x > 0 with ``(C x)_i = |g_i| ** (1 / alpha - 1) x_i ** (-1 / alpha)``; zeros where there is none.

    Newton's method in relative steps ``z = dx / x``, whose systems have a diagonal of at least ``gain / alpha``.
    """
    price_K = norms_K ** (1 / alpha - 1)
    x_K = price_K ** (alpha / (1 + alpha))  # exact if the rows are orthogonal
    residual = math.inf
    for _ in range(MAX_STEPS):
        gain_K = price_K * x_K ** (1 - 1 / alpha)  # x_i (C x)_i at the solution
        scaled_KK = x_K[:, None] * cosines_KK * x_K
        force_K = gain_K - scaled_KK.sum(axis=1)
        newest = float(np.abs(force_K / gain_K).max(initial=0.0))
        # Where the rows nearly cancel out, what the rounding of C leaves of the residual is all that goes to and fro.
        rounding = EPSILON * float((np.abs(scaled_KK).sum(axis=1) / gain_K).max(initial=0.0))
        if newest <= PRECISION or (newest < max(1e-9, 10 * rounding) and newest >= residual):
            break
        residual = newest
        if not math.isfinite(newest) or (gain_K / x_K).min() < RESOLVED * x_K.sum():
            break
        root_K = np.sqrt(gain_K)
        # Scaled by the root of its diagonal part, so that gains of very different sizes do no harm.
        system_KK = scaled_KK / root_K[:, None] / root_K + np.eye(len(x_K)) / alpha
        z_K = np.linalg.solve(system_KK, force_K / root_K) / root_K
        x_K = x_K * step(x_K, z_K, force_K, price_K, cosines_KK, alpha)
    gain_K = price_K * x_K ** (1 - 1 / alpha)
    residual = float(np.abs(x_K * (cosines_KK @ x_K) / gain_K - 1).max(initial=0.0))
    return x_K if residual <= STATIONARY else np.zeros_like(x_K)


def step(
    x_K: NDArray[np.float64],
    z_K: NDArray[np.float64],
    force_K: NDArray[np.float64],
    price_K: NDArray[np.float64],
    cosines_KK: NDArray[np.float64],
    alpha: float,
) -> NDArray[np.float64]:
    """The factors ``1 + t z`` of the longest step t in (0, 1] that keeps x above 0 and is downhill at its end.

    Since the function is convex, it falls all the way while it falls at the end.
    """
    length = min(1.0, 0.9 / max(-z_K.min(initial=0.0), 1e-300))
    for _ in range(60):
        factors_K: NDArray[np.float64] = 1 + length * z_K
        new_K = x_K * factors_K
        slope = z_K @ (x_K * (price_K * new_K ** (-1 / alpha) - cosines_KK @ new_K))
        # Overshooting by less than half of where it came from is progress, too.
        if slope >= -0.5 * (z_K @ force_K):
            break
        length /= 2
    return factors_K
