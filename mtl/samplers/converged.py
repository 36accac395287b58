"""Sampling of tasks that have stopped improving only now and then. Shape suffix: T tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtl.interfaces import TaskFeedback, TaskSampler
from mtl.samplers.draws import DeficitDraws


class Converged:
    """Multiplies the probabilities of the tasks in ``converged`` by ``floor``, and leaves the rest to the others.

    With all of them converged, or none, they are those of ``inner``.

    Args:
        inner: The sampler whose probabilities these are.
        floor: Above 0, at most 1.
        seed: Orders ties between equal tasks.

    ``converged`` is set from outside, by whoever watches the tasks.
    """

    def __init__(self, inner: TaskSampler, floor: float, seed: int = 0) -> None:
        if not 0 < floor <= 1:
            raise ValueError(
                f"floor: must be above 0 and at most 1, found {floor}; a task is never left out altogether"
            )
        self.inner = inner
        self.needs: frozenset[str] = getattr(inner, "needs", frozenset())
        self.converged: Sequence[int] = ()
        self._floor = floor
        self._draws = DeficitDraws(len(inner.probabilities), seed)

    @property
    def probabilities(self) -> Sequence[float]:
        factors = [self._floor if task in self.converged else 1.0 for task in range(len(self.inner.probabilities))]
        weights = [factor * p for factor, p in zip(factors, self.inner.probabilities, strict=True)]
        return [weight / sum(weights) for weight in weights] if self.converged else weights

    @property
    def signals(self) -> Mapping[str, Sequence[float | None]]:
        """Those of ``inner``."""
        signals: Mapping[str, Sequence[float | None]] = getattr(self.inner, "signals", {})
        return signals

    def counts(self, num_examples: int) -> list[int]:
        counts_T = self._draws.counts(self.probabilities, num_examples)
        self.inner.counts(num_examples)  # some count their steps by it
        return counts_T

    def update(self, feedback: TaskFeedback) -> None:
        self.inner.update(feedback)

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self.inner.state_dict(),
            "draws": self._draws.state_dict(),
            "converged": list(self.converged),
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.inner.load_state_dict(state["inner"])
        self._draws.load_state_dict(state["draws"])
        self.converged = list(state["converged"])
