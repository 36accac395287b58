"""The tasks' bargain. Shape suffixes: M present tasks, K rows that are not 0."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtl.surgery.cosine_space import CosineSpace
from mtl.surgery.fairgrad import fair
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.scale import Scale, check_scale, with_mean_norm


class NashMTL(GramianSurgery):
    """``(G w)_i = 1 / w_i`` with ``w > 0``: the Nash bargaining solution, which maximises ``sum_i log <g_i, d>``.

    Every task gains, and the result does not change when a task's loss is multiplied by a number; so loss weights do
    nothing. Its norm is the square root of M whatever the gradients' are. No solution exists at a Pareto-stationary
    point, where the result is 0.

    Solved exactly, without state: the equations hold at the minimum of ``w^T G w / 2 - sum log w``, which is strictly
    convex.

    Source: Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, Eq. 2; there an approximation by a
    sequence of convex programs, and a clip of the norm at 1 that always acts.

    Args:
        scale: ``"mean"`` gives the result the norm of the mean row, so that equal rows give that row and steps shrink
            with the gradients; ``"paper"`` leaves the norm of the square root of M.

    Raises:
        ValueError: If the scale is another word.
    """

    weights_act = "no"

    def __init__(self, scale: Scale = "mean") -> None:
        check_scale(scale)
        self._scale = scale

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        space = CosineSpace.of(gramian_MM)
        weights_K = fair(space.cosines_KK, space.norms_K, alpha=1.0) / space.norms_K
        if self._scale == "mean":
            share = len(space.kept) / space.num_rows  # a row of 0 counts in the mean
            return space.all_rows(share * with_mean_norm(weights_K, space.gramian_KK))
        return space.all_rows(weights_K / (space.unit or 1.0))
