"""The scale of combined gradients. Shape suffix: M present tasks."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Scale = Literal["mean", "paper"]


def check_scale(scale: str) -> None:
    """Raises ``ValueError`` unless it is one of the two words."""
    if scale not in ("mean", "paper"):
        raise ValueError(f'scale: must be "mean" or "paper", found {scale!r}; choose one of them')


def with_mean_norm(coefficients_M: NDArray[np.float64], gramian_MM: NDArray[np.float64]) -> NDArray[np.float64]:
    """The coefficients times what gives their combination the norm of the mean row; zeros where that is 0."""
    squared = coefficients_M @ gramian_MM @ coefficients_M
    if not squared > 0:
        return np.zeros_like(coefficients_M)
    mean_M = np.full(len(gramian_MM), 1 / len(gramian_MM))
    found: NDArray[np.float64] = coefficients_M * np.sqrt(max(mean_M @ gramian_MM @ mean_M, 0.0) / squared)
    return found
