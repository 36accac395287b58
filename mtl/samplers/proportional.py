"""Sampling by size."""

from __future__ import annotations

from collections.abc import Sequence

from mtl.samplers.draws import FixedMixture, checked_sizes


class Proportional(FixedMixture):
    """``p_t = n_t / sum n``: every example of every task is seen equally often.

    Source: examples-proportional mixing without a limit, Raffel et al., JMLR 2020, sec. 3.5.2.

    Args:
        sizes: Training examples ``n_t`` of each task [T], as many as are left after filtering.
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(self, sizes: Sequence[int], seed: int = 0) -> None:
        super().__init__(checked_sizes(sizes), seed)
