"""Projection onto the directions that hurt no task. Shape suffixes: M present tasks, K rows that are not 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from mtl.surgery.cosine_space import CosineSpace
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.nonnegative import nonnegative_qp
from mtl.surgery.scale import Scale, check_scale


class DualProj(GramianSurgery):
    """The vector nearest to the mean gradient that hurts no task: ``argmin |d - g_0|`` subject to ``J d >= 0``.

    Its coefficients are ``argmin v^T G v`` over ``v >= 1 / M``, solved exactly in cosine space. Without conflict it is
    the mean.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, Eq. 8 to 11, with
    the mean gradient in the place of the current task's.

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
        mean_K = space.norms_K / space.num_rows  # of the unit rows
        added_K = nonnegative_qp(space.cosines_KK, -space.cosines_KK @ mean_K)
        return space.all_rows(1 / space.num_rows + np.divide(added_K, space.norms_K))
