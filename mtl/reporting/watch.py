"""Signs of a run that goes wrong, each told once and with the option that would help."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 100  # steps; a task's loss over fewer is mostly noise of which examples it drew
RISE = 1.2
JUMP = 10.0
MIN_NORMS = 20  # the first steps of a warm-up have no median to speak of
MAX_EPOCHS = 5.0
MAX_NAMES = 5


@dataclass
class _Trend:
    """Exponential moving average over about ``WINDOW`` values, unbiased from the first on, and its lowest value."""

    num_values: int = 0
    decayed_sum: float = 0.0
    best: float = math.inf

    def add(self, value: float) -> float:
        self.num_values += 1
        self.decayed_sum += (value - self.decayed_sum) / WINDOW
        average = self.decayed_sum / (1 - (1 - 1 / WINDOW) ** self.num_values)
        if self.num_values >= WINDOW:
            self.best = min(self.best, average)
        return average


class RunWatch:
    """Reads the records of a run's steps and answers with warnings, one line each.

    It warns of a task whose loss has risen 20 % above its best (averages over about 100 of its steps), of a gradient
    norm that is not finite or beyond 10 times its running median, of a task that a window of 100 steps does not see,
    and of a task seen more than 5 epochs. A task is named once in each. Starts afresh after a resume: a warning may
    then come again.
    """

    def __init__(self) -> None:
        self._trends: dict[str, _Trend] = {}
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._stage: str | None = None
        self._num_steps = 0
        self._seen: set[str] = set()
        self._told: set[tuple[str, str]] = set()

    def observe(self, record: Mapping[str, Any], epochs_seen: Mapping[str, float]) -> list[str]:
        """The new warnings after one step.

        Args:
            record: What :func:`mtl.reporting.records.step_record` gave.
            epochs_seen: How often each task's training set has been gone through.
        """
        found = (
            self._rising(record["loss"]),
            self._jumping(record["grad_norm"]),
            self._starved(record),
            self._repeated(epochs_seen),
        )
        return [warning for warning in found if warning]

    def _rising(self, losses: Mapping[str, float]) -> str | None:
        rising = []
        for name, loss in losses.items():
            trend = self._trends.setdefault(name, _Trend())
            if math.isfinite(loss) and trend.add(loss) > RISE * trend.best:
                rising.append(name)
        return self._tell(
            "rising", rising, f"training loss has risen {RISE - 1:.0%} above its best; lower learning_rate"
        )

    def _jumping(self, norm: float) -> str | None:
        usual = median(self._norms) if len(self._norms) >= MIN_NORMS else math.inf
        jumps = not math.isfinite(norm) or norm > JUMP * usual
        if math.isfinite(norm):
            self._norms.append(norm)
        if not jumps or ("jumping", "") in self._told:
            return None
        self._told.add(("jumping", ""))
        return f"gradient norm {norm:.3g}, usually {usual:.3g}; lower learning_rate or max_grad_norm"

    def _starved(self, record: Mapping[str, Any]) -> str | None:
        if record["stage"] != self._stage:
            self._stage, self._num_steps, self._seen = record["stage"], 0, set()
        self._num_steps += 1
        self._seen.update(name for name, count in record["counts"].items() if count > 0)
        if self._num_steps < WINDOW:
            return None
        starved = [name for name in record["p"] if name not in self._seen]
        self._num_steps, self._seen = 0, set()
        return self._tell(
            "starved",
            starved,
            f"not one example in {WINDOW} steps; raise batch_size, or sampler.temperature (with sampler=temperature)",
        )

    def _repeated(self, epochs_seen: Mapping[str, float]) -> str | None:
        repeated = [name for name, epochs in epochs_seen.items() if epochs > MAX_EPOCHS]
        return self._tell(
            "repeated",
            repeated,
            f"training set seen more than {MAX_EPOCHS:.0f} times; lower num_epochs, or use sampler=proportional",
        )

    def _tell(self, sign: str, names: Iterable[str], message: str) -> str | None:
        new = [name for name in names if (sign, name) not in self._told]
        if not new:
            return None
        self._told.update((sign, name) for name in new)
        listed = ", ".join(f"'{name}'" for name in new[:MAX_NAMES])
        more = f" and {len(new) - MAX_NAMES} more" if len(new) > MAX_NAMES else ""
        return f"{'task' if len(new) == 1 else 'tasks'} {listed}{more}: {message}"
