"""From probabilities to whole examples: what the samplers are composed of. Shape suffix: T tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import TaskFeedback

# Deficits stay below 1 in size, so their rounding error stays far below this even after 1e6 draws.
ROUNDING = 1e-9


class DeficitDraws:
    """Draws tasks without chance, so that every count stays within one example of its expectation.

    The deficit of task t at the n-th draw is ``d_t = n p_t - c_t``, with ``c_t`` the examples it has had so far. With
    ``q = 1 / (2T - 2)``, the task drawn is, among those with ``d_t >= q``, the one whose deficit would exceed
    ``1 - q`` soonest: smallest ``(1 - q - d_t) / p_t``. Then ``|c_t - n p_t| <= 1 - q`` at every n. Where the
    probabilities change between calls, the sum of ``p_t`` over the draws so far takes the place of ``n p_t``.

    Source: Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980).

    Args:
        num_tasks: Number of tasks T.
        seed: Orders ties only, so that equal tasks do not always come in the order of the config.
    """

    def __init__(self, num_tasks: int, seed: int = 0) -> None:
        self._order_T = np.random.default_rng(seed).permutation(num_tasks)
        self._deficits_T = np.zeros(num_tasks)

    def counts(self, probabilities_T: Sequence[float], num_examples: int) -> list[int]:
        """Draws ``num_examples`` examples and returns how many of them each task gets.

        A task of probability 0 is never drawn, whatever it is still owed.
        """
        p_T = np.asarray(probabilities_T, dtype=np.float64)
        drawable = self._order_T[p_T[self._order_T] > 0]
        p, deficits = p_T[drawable], self._deficits_T[drawable]
        drawn = np.zeros(len(drawable), dtype=np.int64)
        q = 1 / (2 * max(len(p_T), 2) - 2)
        with np.errstate(over="ignore"):  # an infinite deadline of a denormal p_t is as good as the true one
            for _ in range(num_examples):
                deficits += p
                # The largest deficit is below q only if tasks of probability 0 are still owed examples.
                (eligible,) = np.nonzero(deficits >= min(q, deficits.max()) - ROUNDING)
                deadlines = (1 - q - deficits[eligible]) / p[eligible]
                chosen = eligible[deadlines.argmin()]
                deficits[chosen] -= 1
                drawn[chosen] += 1
        self._deficits_T[drawable] = deficits
        counts_T = np.zeros(len(p_T), dtype=np.int64)
        counts_T[drawable] = drawn
        return [int(count) for count in counts_T]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order_T.tolist(), "deficits": self._deficits_T.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` if the state is that of another number of tasks."""
        if len(state["deficits"]) != len(self._deficits_T):
            raise ValueError(
                f"sampler state: must have the run's {len(self._deficits_T)} tasks, found {len(state['deficits'])}; "
                "resume with the tasks of the checkpoint"
            )
        self._order_T = np.array(state["order"], dtype=np.int64)
        self._deficits_T = np.array(state["deficits"], dtype=np.float64)


class FixedMixture:
    """Samples with probabilities that never change: what the size-based samplers have in common.

    Args:
        weights_T: Unnormalised probabilities, finite, not negative and not all 0.
        seed: Orders ties between equal tasks.
    """

    probabilities: Sequence[float]

    def __init__(self, weights_T: NDArray[np.float64], seed: int) -> None:
        self.probabilities = tuple((weights_T / weights_T.sum()).tolist())
        self._draws = DeficitDraws(len(weights_T), seed)

    def counts(self, num_examples: int) -> list[int]:
        return self._draws.counts(self.probabilities, num_examples)

    def update(self, feedback: TaskFeedback) -> None:
        """Does nothing: the mixture is fixed."""

    def state_dict(self) -> dict[str, Any]:
        return self._draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state)


def checked_sizes(sizes: Sequence[int]) -> NDArray[np.float64]:
    """Returns the sizes as an array [T]; raises ``ValueError`` if there is no task or a task without examples."""
    if not len(sizes):
        raise ValueError("sizes: must hold at least one task, found none; add a task")
    for task, size in enumerate(sizes):
        if size < 1:
            raise ValueError(
                f"sizes: every task must have an example, found {size} at index {task}; add rows or drop the task"
            )
    return np.asarray(sizes, dtype=np.float64)
