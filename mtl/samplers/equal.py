"""Sampling every task alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtl.samplers.draws import FixedMixture, checked_sizes


class Equal(FixedMixture):
    """``p_t = 1 / T``: every task is seen equally often, so small tasks are repeated.

    Args:
        sizes: Training examples of each task [T]; only their number matters.
        seed: Orders ties, which here are between all tasks.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(self, sizes: Sequence[int], seed: int = 0) -> None:
        super().__init__(np.ones_like(checked_sizes(sizes)), seed)
