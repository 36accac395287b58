"""A common scale for values whose range is not known beforehand. Shape suffix: M values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Values that lie closer together than this differ by rounding only.
MIN_SPREAD = 1e-12


class RunningScale:
    """Rescales values to [0, 1] by the 20 % and 80 % quantiles of all values so far.

    The quantiles are those of a uniform random sample of bounded size: of the n-th value on, each replaces a random one
    with the probability size / n (Vitter, "Random Sampling with a Reservoir", ACM TOMS 11 (1985), Algorithm R).

    Source: Graves et al., "Automated Curriculum Learning for Neural Networks", ICML 2017, sec. 2.3, where the range is
    [-1, 1].

    Args:
        reservoir_size: Values kept, at least 1.
        seed: Of the generator that decides which values are kept.
    """

    def __init__(self, reservoir_size: int, seed: int) -> None:
        if reservoir_size < 1:
            raise ValueError(f"reservoir_size: must be at least 1, found {reservoir_size}; take 1000")
        self._size = reservoir_size
        self._generator = np.random.default_rng(seed)
        self._kept: list[float] = []
        self._num_values = 0

    def __call__(self, values_M: NDArray[np.float64]) -> NDArray[np.float64]:
        """Takes in the values and rescales them: 0 below the low quantile, 1 above the high one, linear between."""
        for value in values_M.tolist():
            self._num_values += 1
            if len(self._kept) < self._size:
                self._kept.append(value)
            elif (place := int(self._generator.integers(self._num_values))) < self._size:
                self._kept[place] = value
        low, high = (float(quantile) for quantile in np.quantile(self._kept, [0.2, 0.8]))
        return (0.5 + (values_M - (low + high) / 2) / max(high - low, MIN_SPREAD)).clip(0, 1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "kept": list(self._kept),
            "num_values": self._num_values,
            "generator": self._generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = list(state["kept"])
        self._num_values = state["num_values"]
        self._generator.bit_generator.state = state["generator"]
