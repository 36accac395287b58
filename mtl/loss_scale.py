"""Dynamic loss scaling, without which small gradients vanish in float16."""

from __future__ import annotations

from typing import Any

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # steps without an overflow, after which a larger scale is tried


class LossScale:
    """The factor of every loss before the backward, by which gradients are divided afterwards.

    Always a power of two, so that it changes no bit of a gradient that neither overflows nor underflows. It is halved
    when a gradient overflows and doubled after 2,000 steps without.

    Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018, sec. 3.2.

    Args:
        enabled: Whether the run computes in float16; otherwise the scale stays 1.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = INITIAL_SCALE if enabled else 1.0
        self._num_good_steps = 0

    def overflowed(self) -> bool:
        """Takes note of a gradient that is not finite; says whether the scale can be to blame, and lowers it then."""
        self._num_good_steps = 0
        if not self.enabled or self.scale <= 1.0:
            return False
        self.scale /= 2
        return True

    def succeeded(self) -> None:
        """Takes note of a step without an overflow."""
        if not self.enabled:
            return
        self._num_good_steps += 1
        if self._num_good_steps % GROWTH_INTERVAL == 0:
            self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "num_good_steps": self._num_good_steps}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        if self.enabled:
            self.scale, self._num_good_steps = state["scale"], state["num_good_steps"]
