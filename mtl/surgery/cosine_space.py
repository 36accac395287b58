"""Gramians in cosine space, where most surgery has solutions that do not depend on the norms of the rows.

With ``s_i = |g_i|`` and ``C = S^-1 G S^-1``, a combination ``w^T J`` has the coefficients ``x = S w`` of the unit rows.
Shape suffixes: M present tasks, K of them with a gradient that is not 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A squared norm below this has lost its digits, and the row its direction.
TINY = 1e-290


# The rounding of rows in float64 takes eigenvalues of the cosines below 0 by less than this.
ROUNDING = 1e-14


def without_negative_eigenvalues(cosines_KK: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cosines without what the rounding of rows in float32 or bfloat16 adds to them that no rows have.

    A problem over the rows has no solution where some combination of them has a negative square.
    """
    values_K, vectors_KK = np.linalg.eigh(cosines_KK)
    if values_K.min(initial=0.0) > -ROUNDING * len(values_K):
        return cosines_KK
    cut_KK = (vectors_KK * np.maximum(values_K, 0.0)) @ vectors_KK.T
    norms_K = np.sqrt(cut_KK.diagonal())
    found: NDArray[np.float64] = cut_KK / norms_K[:, None] / norms_K
    return found


@dataclass(frozen=True)
class CosineSpace:
    """The rows that have a direction.

    Args:
        kept: Their indices [K].
        norms_K: Their norms ``s``, divided by the largest, so that no square of one leaves the range of numbers.
        cosines_KK: ``C``, with ones on its diagonal.
        unit: The largest norm.
        num_rows: M.
    """

    kept: NDArray[np.intp]
    norms_K: NDArray[np.float64]
    cosines_KK: NDArray[np.float64]
    unit: float
    num_rows: int

    @classmethod
    def of(cls, gramian_MM: Tensor) -> CosineSpace:
        """Of a Gramian."""
        inner_MM = gramian_MM.detach().to("cpu", torch.float64).numpy()
        squares_M = inner_MM.diagonal()
        (kept,) = np.nonzero(squares_M > TINY)
        norms_K = np.sqrt(squares_M[kept])
        cosines_KK = inner_MM[np.ix_(kept, kept)] / norms_K[:, None] / norms_K
        cosines_KK = without_negative_eigenvalues(np.clip((cosines_KK + cosines_KK.T) / 2, -1, 1))
        np.fill_diagonal(cosines_KK, 1.0)
        unit = float(norms_K.max(initial=0.0))
        return cls(kept, norms_K / unit if len(kept) else norms_K, cosines_KK, unit, len(inner_MM))

    @property
    def gramian_KK(self) -> NDArray[np.float64]:
        """Of the kept rows, divided by the square of the largest norm."""
        return self.norms_K[:, None] * self.cosines_KK * self.norms_K

    def all_rows(self, coefficients_K: NDArray[np.float64]) -> Tensor:
        """The kept rows' coefficients among those of all rows [M]; a row without a direction counts 0."""
        coefficients_M = torch.zeros(self.num_rows, dtype=torch.float64)
        coefficients_M[torch.from_numpy(self.kept)] = torch.from_numpy(np.ascontiguousarray(coefficients_K))
        return coefficients_M
