"""Sampling that goes from proportional to nearly equal. Shape suffix: T tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import TaskFeedback
from mtl.samplers.draws import checked_sizes
from mtl.samplers.moving import MovingMixture, softmax


class Annealed(MovingMixture):
    """``p_t ~ n_t ** alpha``, with ``alpha`` going from ``alpha_start`` to ``alpha_end`` in equal parts over the stage.

    Large tasks come first, where much is to be learned from them; at the end all tasks weigh nearly the same. At step i
    of E, ``alpha = alpha_start + (alpha_end - alpha_start) i / (E - 1)``, always from the sizes themselves.

    Source: Stickland and Murray, "BERT and PALs", ICML 2019, sec. 4.1, where alpha is 1 in the first epoch and 0.2 in
    the last; here a step takes the place of an epoch.

    Args:
        sizes: Training examples ``n_t`` of each task [T], as many as are left after filtering.
        num_steps: Optimizer steps E of the stage; a stage of one step has ``alpha_start``.
        alpha_start: Exponent of the first step; 1 is proportional, 0 equal.
        alpha_end: Exponent of the last step.
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If a size or the number of steps is below 1, or an exponent is not finite.
    """

    def __init__(
        self, sizes: Sequence[int], num_steps: int, alpha_start: float = 1.0, alpha_end: float = 0.2, seed: int = 0
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps: must be at least 1, found {num_steps}; pass the steps of the stage")
        for name, alpha in (("alpha_start", alpha_start), ("alpha_end", alpha_end)):
            if not np.isfinite(alpha):
                raise ValueError(f"{name}: must be finite, found {alpha}; 1 is proportional to size, 0 equal")
        sizes_T = checked_sizes(sizes)
        # Relative to the largest: a large exponent would overflow n ** alpha.
        self._log_sizes_T = np.log(sizes_T / sizes_T.max())
        self._num_steps_of_stage = num_steps
        self._alpha_start = alpha_start
        self._alpha_end = alpha_end
        super().__init__(self._tempered(0), seed=seed)

    def _shares(self, feedback: TaskFeedback) -> NDArray[np.float64]:
        return self._tempered(self._num_steps)

    def _tempered(self, step: int) -> NDArray[np.float64]:
        last = self._num_steps_of_stage - 1
        progress = min(step, last) / max(last, 1)
        return softmax((self._alpha_start + (self._alpha_end - self._alpha_start) * progress) * self._log_sizes_T)
