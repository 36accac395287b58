"""Directions with the same angle to every gradient. Shape suffixes: M present tasks, K rows that are not 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mtl.surgery.cosine_space import CosineSpace
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.scale import Scale, check_scale

# Smaller eigenvalues of the cosines, as a share of the number of rows, are rounding of a Gramian in float64. Larger
# ones may be what is left of rows that nearly cancel out: without them there is no direction of equal angles.
RANK_TOLERANCE = 1e-14
# ``1^T C^+ 1`` is at least 1 where some combination of the unit rows has a product with all of them.
CANCELLED = 1e-10


def equal_angles(cosines_KK: NDArray[np.float64]) -> NDArray[np.float64]:
    """``C^+ 1``: coefficients of the unit rows, whose combination has the same product with each of them if any has."""
    values_K, vectors_KK = np.linalg.eigh(cosines_KK)
    kept = values_K > RANK_TOLERANCE * len(values_K)
    vectors = vectors_KK[:, kept]
    found: NDArray[np.float64] = vectors @ (vectors.sum(axis=0) / values_K[kept])
    return found


def conflict_free(space: CosineSpace) -> NDArray[np.float64]:
    """ConFIG's coefficients [K] in the paper's scale."""
    x_K = equal_angles(space.cosines_KK)
    products_K = space.cosines_KK @ x_K
    squared = x_K @ products_K
    if not squared > CANCELLED:  # the unit rows add up to 0
        return np.zeros_like(x_K)
    found: NDArray[np.float64] = x_K / space.norms_K * (space.norms_K @ products_K / squared)
    return found


class ConFIG(GramianSurgery):
    """``d = (sum_i <g_i, u>) u``, where the unit vector u has the same cosine with every gradient.

    ``u`` is along ``U^+ 1``, U the unit rows; ``C^+ 1`` in terms of their Gramian. No task is hurt while the gradients
    are linearly independent. The direction does not depend on the gradients' norms, so loss weights only change the
    length. Coefficients may be negative.

    Source: Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR
    2025, Eq. 2 to 4.

    Args:
        scale: ``"mean"`` divides the paper's length by M, so that equal rows give that row; ``"paper"`` leaves it.

    Raises:
        ValueError: If the scale is another word.
    """

    weights_act = "no"

    def __init__(self, scale: Scale = "mean") -> None:
        check_scale(scale)
        self._scale = scale

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        space = CosineSpace.of(gramian_MM)
        found_M = space.all_rows(conflict_free(space))
        return found_M / space.num_rows if self._scale == "mean" else found_M
