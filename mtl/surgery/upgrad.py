"""Projection of each gradient onto the directions that hurt no task. Shape suffixes: M present tasks, K rows not 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mtl.surgery.cosine_space import CosineSpace
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.nonnegative import nonnegative_qp
from mtl.surgery.scale import Scale, check_scale


class UPGrad(GramianSurgery):
    """The mean of the gradients, each first projected onto the directions that hurt no task.

    The projection of ``g_i`` onto ``{d : J d >= 0}`` is ``J^T v`` with ``v = argmin v^T G v`` over ``v >= e_i``. These
    M problems are solved exactly in cosine space, where they do not depend on the norms of the rows. Without conflict
    it is the mean; for two tasks it is PCGrad.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232 (2024), Eq. 3.

    Args:
        scale: ``"mean"`` and ``"paper"`` are the same here: equal rows give that row.

    Raises:
        ValueError: If the scale is another word.
    """

    weights_act = "partly"

    def __init__(self, scale: Scale = "mean") -> None:
        check_scale(scale)

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        space = CosineSpace.of(gramian_MM)
        total_K = space.norms_K.copy()  # of the unit rows
        for row, norm in enumerate(space.norms_K):
            cosines_K = space.cosines_KK[row]
            if cosines_K.min() < 0:
                total_K += norm * nonnegative_qp(space.cosines_KK, -cosines_K)
        return space.all_rows(np.divide(total_K, space.norms_K) / space.num_rows)
