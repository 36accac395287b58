"""Sampling as the config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mtl.samplers.draws import FixedMixture, checked_sizes
from mtl.samplers.values import value_of_each_task


class Specified(FixedMixture):
    """``p_t`` as given, divided by their sum: percentages and counts will do, and a stage may have only some tasks.

    Args:
        sizes: Training examples of each task [T]; only their number matters.
        probabilities: A mapping from task name, which must name every task, or one value for each task in order.
            Finite, not negative, not all 0; a task of probability 0 is never seen.
        names: Names of the T tasks; needed to read a mapping.
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If a probability is out of range, a name is unknown, or a task has none.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        probabilities: Mapping[str, float] | Sequence[float],
        names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        weights = value_of_each_task("probabilities", probabilities, names, len(checked_sizes(sizes)))
        for weight in weights:
            if not 0 <= weight < np.inf:
                raise ValueError(f"probabilities: must be finite and not negative, found {weight}; 0 leaves a task out")
        if not any(weights):
            raise ValueError(f"probabilities: must not all be 0, found {weights}; give a task more than 0")
        super().__init__(np.array(weights), seed)
