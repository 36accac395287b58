"""What a task's examples brought: the rewards of the bandits. Shape suffixes: T tasks, M tasks with a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import Stateful, TaskFeedback
from mtl.samplers.moving import MIN_LOSS, validation_losses


class Reward(NamedTuple):
    """Rewards of the tasks that were drawn; an absent task has not been pulled and has none.

    A step draws ``n_t`` of its B examples from task t where the bandits of the papers draw one arm, so ``n_t / B``
    takes the place of the indicator in the importance-weighted estimate ``r_t (n_t / B) / p_t`` of the reward of an
    arm. Many examples bring the loss down further than few, so the reward of one draw is the fall per example;
    otherwise the tasks that happen to be drawn more would be drawn ever more.

    Args:
        tasks: The M tasks.
        gains_M: Relative fall of the loss, as if by an equal share of the examples: times ``B / (T n_t)``. Below 0 if
            the loss rose.
        importance_M: ``(n_t / B) / p_t``.
    """

    tasks: Sequence[int]
    gains_M: NDArray[np.float64]
    importance_M: NDArray[np.float64]


class RewardSource(Stateful, Protocol):
    """Turns feedback into rewards; ``needs`` is the sampler's."""

    needs: frozenset[str]

    def collect(self, feedback: TaskFeedback, probabilities: Sequence[float]) -> Reward | None: ...


class LossDecrease:
    """Prediction gain: how far the step brought down the loss of its own examples, relative to the loss before.

    Args:
        num_tasks: Number of tasks T.
    """

    needs = frozenset({"losses_after"})

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks

    def collect(self, feedback: TaskFeedback, probabilities: Sequence[float]) -> Reward | None:
        """The rewards of a step that was drawn with these probabilities.

        Raises:
            ValueError: If a step comes without the losses after it.
        """
        if not feedback.tasks:
            return None
        if feedback.losses_after_M is None:
            raise ValueError("losses_after_M: must be given for rewards by loss_decrease, found None; use gap_closed")
        tasks = np.array(feedback.tasks)
        shares_M = np.array(feedback.counts_M) / sum(feedback.counts_M)
        before_M, after_M = np.array(feedback.losses_M.tolist()), np.array(feedback.losses_after_M.tolist())
        finite = np.isfinite(after_M)  # a step may throw a loss beyond all bounds, and the weights would keep it
        gains_M = relative_fall(before_M, after_M) / (self._num_tasks * shares_M)
        importance_M = shares_M / np.array(probabilities)[tasks]
        return Reward(tasks[finite].tolist(), gains_M[finite], importance_M[finite]) if finite.any() else None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: there is no state."""


class GapClosed:
    """How far the validation loss fell since the task's evaluation before, relative to it.

    The steps between count as one draw: ``n_t`` and ``B p_t`` are summed over them. A task without an example since its
    last evaluation was not pulled, whatever its loss did.

    Args:
        num_tasks: Number of tasks T.
    """

    needs = frozenset({"validation"})

    def __init__(self, num_tasks: int) -> None:
        self._losses_T: list[float | None] = [None] * num_tasks
        self._counts_T = np.zeros(num_tasks)
        self._expected_T = np.zeros(num_tasks)
        self._totals_T = np.zeros(num_tasks)  # examples of all tasks since the task's last evaluation

    def collect(self, feedback: TaskFeedback, probabilities: Sequence[float]) -> Reward | None:
        """Counts the examples of a step that was drawn with these probabilities; the rewards of an evaluation."""
        if feedback.tasks:
            self._counts_T[list(feedback.tasks)] += feedback.counts_M
            self._expected_T += sum(feedback.counts_M) * np.array(probabilities)
            self._totals_T += sum(feedback.counts_M)
        losses = validation_losses(feedback)
        pulled = {
            task: before for task in losses if (before := self._losses_T[task]) is not None and self._counts_T[task]
        }
        tasks = list(pulled)
        falls_M = relative_fall(np.array(list(pulled.values())), np.array([losses[task] for task in tasks]))
        gains_M = falls_M * self._totals_T[tasks] / (len(self._losses_T) * self._counts_T[tasks])
        reward = Reward(tasks, gains_M, self._counts_T[tasks] / self._expected_T[tasks])
        for task, loss in losses.items():
            self._losses_T[task] = loss
            self._counts_T[task] = self._expected_T[task] = self._totals_T[task] = 0
        return reward if tasks else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses_T),
            "counts": self._counts_T.tolist(),
            "expected": self._expected_T.tolist(),
            "totals": self._totals_T.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses_T = list(state["losses"])
        self._counts_T = np.array(state["counts"])
        self._expected_T = np.array(state["expected"])
        self._totals_T = np.array(state["totals"])


SOURCES: dict[str, Callable[[int], RewardSource]] = {"loss_decrease": LossDecrease, "gap_closed": GapClosed}


def reward_source(reward: str, num_tasks: int) -> RewardSource:
    """Makes the source of that name; raises ``ValueError`` if there is none."""
    if reward not in SOURCES:
        raise ValueError(f"reward: must be {' or '.join(SOURCES)}, found {reward!r}; choose one of them")
    return SOURCES[reward](num_tasks)


def relative_fall(before_M: NDArray[np.float64], after_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(before - after) / before``, where losses near 0 count as :data:`MIN_LOSS`."""
    return (before_M - after_M) / np.maximum(before_M, MIN_LOSS)
