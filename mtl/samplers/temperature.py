"""Sampling by tempered size. Shape suffix: T tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtl.samplers.draws import FixedMixture, checked_sizes


class Temperature(FixedMixture):
    """``p_t ~ min(n_t, max_size) ** (1 / temperature)``: between proportional (1) and equal (infinity).

    Source: temperature-scaled mixing, Raffel et al., JMLR 2020, sec. 3.5.2, with the cap before the exponent. The
    ``alpha`` of other papers (Xue et al., NAACL 2021: 0.3) is ``1 / temperature``.

    Args:
        sizes: Training examples ``n_t`` of each task [T], as many as are left after filtering.
        temperature: Above 0, may be infinite; below 1 it favours large tasks more than their size does.
        max_size: Size beyond which a task counts as no larger [examples]; ``None`` for no cap.
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If a size or the cap is below 1, or the temperature is not above 0.
    """

    def __init__(
        self, sizes: Sequence[int], temperature: float = 2.0, max_size: int | None = None, seed: int = 0
    ) -> None:
        if not temperature > 0:
            raise ValueError(
                f"temperature: must be above 0, found {temperature}; 1 is proportional to size, .inf equal"
            )
        if max_size is not None and max_size < 1:
            raise ValueError(f"max_size: must be at least 1 example, found {max_size}; null means no cap")
        capped_T = np.minimum(checked_sizes(sizes), np.inf if max_size is None else max_size)
        # Relative to the largest: a small temperature would overflow n ** (1 / temperature).
        super().__init__(np.exp(np.log(capped_T / capped_T.max()) / temperature), seed)
