"""Quantiles of everything so far, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


class Reservoir:
    """A uniform random sample of all values added so far.

    Source: Vitter, "Random Sampling with a Reservoir", ACM TOMS 11 (1985), Algorithm R.

    Args:
        size: Values kept, at least 1.
        seed: Of the generator that decides which values stay.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"reservoir_size: must be at least 1, found {size}; 1000 gives the quantiles to 1.3 %")
        self._size = size
        self._generator = np.random.default_rng(seed)
        self._values: list[float] = []
        self._num_added = 0

    def add(self, values: Iterable[float]) -> None:
        """Each value ends up in the sample with the same probability."""
        for value in values:
            self._num_added += 1
            if len(self._values) < self._size:
                self._values.append(float(value))
            elif (place := int(self._generator.integers(self._num_added))) < self._size:
                self._values[place] = float(value)

    def quantiles(self, *levels: float) -> list[float]:
        """The sample's quantiles at these levels in [0, 1], linear between the values."""
        return [float(quantile) for quantile in np.quantile(self._values, levels)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": list(self._values),
            "num_added": self._num_added,
            "generator": self._generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values = list(state["values"])
        self._num_added = state["num_added"]
        self._generator.bit_generator.state = state["generator"]
