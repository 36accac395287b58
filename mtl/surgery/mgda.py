"""The shortest convex combination. Shape suffixes: M present tasks, K rows that are not 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.surgery.cosine_space import CosineSpace
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.nonnegative import nonnegative_qp
from mtl.surgery.scale import Scale, check_scale


class MGDA(GramianSurgery):
    """``w = argmin w^T G w`` over the simplex: the shortest vector between the gradients.

    ``<g_i, d> >= |d|^2`` for every task: no task is hurt, and the steps get shorter near a Pareto-stationary point,
    where d = 0. The shortest gradients rule, and so one task that is nearly done slows all others down.

    Solved exactly: with the coefficients x of the unit rows and ``a = 1 / |g|``, ``w`` is the argmin of
    ``x^T C x / 2 - a^T x`` over ``x >= 0``, brought to sum 1.

    Sources: Desideri, "Multiple-gradient descent algorithm", C. R. Math. 350 (2012); Sener and Koltun, "Multi-Task
    Learning as Multi-Objective Optimization", NeurIPS 2018, Eq. 3.

    Args:
        scale: ``"mean"`` and ``"paper"`` are the same here: equal rows give that row.

    Raises:
        ValueError: If the scale is another word.
    """

    weights_act = "reversed"

    def __init__(self, scale: Scale = "mean") -> None:
        check_scale(scale)

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        space = CosineSpace.of(gramian_MM)
        if len(space.kept) < space.num_rows:
            # A row of 0 is the shortest combination itself.
            return torch.zeros(space.num_rows, dtype=torch.float64)
        inverse_K = space.norms_K.min() / space.norms_K
        weights_K = nonnegative_qp(space.cosines_KK, inverse_K) * inverse_K
        return space.all_rows(weights_K / weights_K.sum())
