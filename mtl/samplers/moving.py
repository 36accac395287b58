"""Probabilities that move while training goes on: what such samplers have in common. Shape suffix: T tasks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import TaskFeedback
from mtl.samplers.draws import DeficitDraws

# A loss so near 0 that a ratio to it would be noise [nats per target token].
MIN_LOSS = 1e-3


class MovingMixture(ABC):
    """Samples with probabilities that move.

    A subclass answers every feedback with the shares ``s`` that the tasks should have, or with ``None`` if it learned
    nothing. Then ``p <- smoothing p + (1 - smoothing) ((1 - floor) s + floor / T)``.

    ``signals`` says what moved them: the name of each quantity to its newest value per task, ``None`` for a task that
    has none yet; empty before there is any.

    Args:
        start_T: Unnormalised shares of the start, not negative and not all 0.
        floor: Share of the examples, in [0, 1], that is spread evenly over all tasks.
        warmup: Steps that are drawn with the probabilities of the start; the subclass learns meanwhile.
        smoothing: Weight of the old probabilities in every move, in [0, 1).
        seed: Orders ties between equal tasks.
    """

    needs: frozenset[str] = frozenset()
    probabilities: Sequence[float]
    signals: Mapping[str, Sequence[float | None]]

    def __init__(
        self, start_T: NDArray[np.float64], *, floor: float = 0.0, warmup: int = 0, smoothing: float = 0.0, seed: int
    ) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"floor: must be a share in [0, 1], found {floor}; 0.05 spreads 5 % evenly")
        if not warmup >= 0:
            raise ValueError(f"warmup: must be a number of steps, at least 0, found {warmup}; 0 moves at once")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: must be in [0, 1), found {smoothing}; 0 moves all the way at once")
        self._floor = floor
        self._warmup = warmup
        self._smoothing = smoothing
        self._num_steps = 0
        self._draws = DeficitDraws(len(start_T), seed)
        self.signals = {}
        self.probabilities = tuple(self._with_floor(start_T / start_T.sum()).tolist())

    @abstractmethod
    def _shares(self, feedback: TaskFeedback) -> NDArray[np.float64] | None:
        """Learns from the feedback; the new shares [T], which sum to 1, or ``None`` if there is nothing new."""

    def counts(self, num_examples: int) -> list[int]:
        return self._draws.counts(self.probabilities, num_examples)

    def update(self, feedback: TaskFeedback) -> None:
        """Learns from a step or an evaluation, and moves the probabilities if the warm-up is over."""
        self._num_steps += len(feedback.tasks) > 0
        shares_T = self._shares(feedback)
        if shares_T is not None and self._num_steps >= self._warmup:
            target_T = (1 - self._smoothing) * self._with_floor(shares_T)
            self.probabilities = tuple((self._smoothing * np.array(self.probabilities) + target_T).tolist())

    def state_dict(self) -> dict[str, Any]:
        return {
            "probabilities": list(self.probabilities),
            "signals": {name: list(values) for name, values in self.signals.items()},
            "num_steps": self._num_steps,
            "draws": self._draws.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` if the state is that of another number of tasks."""
        self._draws.load_state_dict(state["draws"])
        self.probabilities = tuple(state["probabilities"])
        self.signals = {name: list(values) for name, values in state["signals"].items()}
        self._num_steps = state["num_steps"]

    def _note(self, name: str, newest: Mapping[int, float]) -> None:
        """Makes a quantity the signal; tasks without a new value keep their last."""
        values_T = list(self.signals.get(name, [None] * len(self.probabilities)))
        for task, value in newest.items():
            values_T[task] = value
        self.signals = {name: values_T}

    def _with_floor(self, shares_T: NDArray[np.float64]) -> NDArray[np.float64]:
        return (1 - self._floor) * shares_T + self._floor / len(shares_T)


def softmax(logits_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """``exp(x) / sum exp(x)``, without overflow."""
    powers_T = np.exp(logits_T - logits_T.max())
    shares_T: NDArray[np.float64] = powers_T / powers_T.sum()
    return shares_T


def filled(values_T: Sequence[float | None]) -> NDArray[np.float64]:
    """The values, with the mean of the known ones for those that are missing; at least one must be known."""
    known = [value for value in values_T if value is not None]
    mean = sum(known) / len(known)
    return np.array([mean if value is None else value for value in values_T])


def validation_losses(feedback: TaskFeedback) -> dict[int, float]:
    """The finite losses of an evaluation by task; none if there was no evaluation."""
    results = feedback.validation or {}
    return {task: scores["loss"] for task, scores in results.items() if math.isfinite(scores.get("loss", math.nan))}
