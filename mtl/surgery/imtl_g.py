"""The same progress along every gradient. Shape suffixes: M present tasks, K rows that are not 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtl.surgery.config import conflict_free, equal_angles
from mtl.surgery.cosine_space import CosineSpace
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.scale import Scale, check_scale

# Share that the sum of the coefficients must have of the sum of their sizes. Below, they nearly cancel out: the paper's
# division by their sum then gives a very long vector or, if the sum is negative, one that is uphill for every task.
MIN_SUM = 1e-2


class IMTLG(GramianSurgery):
    """``<g_i, d> / |g_i|`` equal for all tasks and coefficients of sum 1: ``w = G^+ s / 1^T G^+ s``, ``s = |g|``.

    The direction is that of :class:`ConFIG` and does not depend on the gradients' norms, so loss weights do not act on
    it. Where the paper's coefficients nearly cancel out or sum to less than 0, the result is ConFIG's.

    Source: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, Eq. 5 and 6; the guard is ours.

    Args:
        scale: ``"mean"`` and ``"paper"`` are the same here: equal rows give that row.

    Raises:
        ValueError: If the scale is another word.
    """

    weights_act = "no"

    def __init__(self, scale: Scale = "mean") -> None:
        check_scale(scale)

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        space = CosineSpace.of(gramian_MM)
        if not len(space.kept):
            return torch.zeros(space.num_rows, dtype=torch.float64)
        unscaled_K = equal_angles(space.cosines_KK) / space.norms_K
        total = unscaled_K.sum()
        if total > MIN_SUM * np.abs(unscaled_K).sum():
            return space.all_rows(unscaled_K / total)
        return space.all_rows(conflict_free(space)) / space.num_rows
