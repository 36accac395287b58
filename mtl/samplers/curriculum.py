"""Sampling by a plan over the stage. Shape suffix: T tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import TaskFeedback
from mtl.samplers.draws import checked_sizes
from mtl.samplers.moving import MovingMixture, validation_losses
from mtl.samplers.values import value_of_each_task

# Steps by which a phase may end early or late: 3 * 0.1 steps of 10 are 3 and not 3.0000000000000004.
ROUNDING = 1e-9


class Curriculum(MovingMixture):
    """Samples the tasks in an order, or by a schedule of mixtures.

    With an order, the stage has T phases of equal length. In the k-th, the k-th task has the weight 1, the tasks before
    it have the weight ``overlap``, and those to come 0: ``overlap=1`` lets the tasks join one after the other (Baby
    Steps), ``overlap=0`` trains one at a time (One-Pass). The order ``"difficulty"`` is that of the validation losses
    at the first evaluation, the one before training, lowest first; until then all tasks are sampled alike.

    Sources: Bengio et al., "Curriculum Learning", ICML 2009; the two regimes as named by Cirik, Hovy and Morency,
    "Visualizing and Understanding Curriculum Learning for Long Short-Term Memory Networks", arXiv 1611.06204, sec. 3.

    Args:
        sizes: Training examples of each task [T]; only their number matters.
        num_steps: Optimizer steps of the stage.
        names: Names of the T tasks; needed to read a schedule, or an order of names.
        order: ``"difficulty"``, or the names of all tasks, the first to be trained first.
        overlap: Weight of the earlier tasks, in [0, 1].
        schedule: Mixtures instead of an order: a list of ``{until: share of the stage, weights: {task: weight}}`` with
            ascending ``until``, the last 1. Weights are divided by their sum; a task that is not named has 0.
        floor: Share of the examples, in [0, 1], that is spread evenly over all tasks at all times.
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If an argument is outside its range, or a name is unknown or missing.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        num_steps: int,
        names: Sequence[str] | None = None,
        order: str | Sequence[str] = "difficulty",
        overlap: float = 1.0,
        schedule: Sequence[Mapping[str, Any]] | None = None,
        floor: float = 0.0,
        seed: int = 0,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps: must be at least 1, found {num_steps}; pass the steps of the stage")
        if not 0 <= overlap <= 1:
            raise ValueError(f"overlap: must be in [0, 1], found {overlap}; 1 lets the tasks join one after the other")
        num_tasks = len(checked_sizes(sizes))
        self._overlap = overlap
        self._num_steps_of_stage = num_steps
        self._phases: list[tuple[float, NDArray[np.float64]]] | None = None  # (until, shares [T])
        if schedule is not None:
            self._phases = phases_of_schedule(schedule, names, num_tasks)
        elif order != "difficulty":
            self._phases = phases_of_order(order_of_names(order, names), overlap)
        super().__init__(self._planned(0, num_tasks), floor=floor, seed=seed)

    def _shares(self, feedback: TaskFeedback) -> NDArray[np.float64]:
        num_tasks = len(self.probabilities)
        losses = validation_losses(feedback)
        if self._phases is None and len(losses) == num_tasks:
            difficulties_T = [losses[task] for task in range(num_tasks)]
            self.signals = {"difficulty": difficulties_T}
            self._phases = phases_of_order(order_of_difficulty(difficulties_T), self._overlap)
        return self._planned(self._num_steps, num_tasks)

    def _planned(self, step: int, num_tasks: int) -> NDArray[np.float64]:
        if self._phases is None:
            return np.full(num_tasks, 1 / num_tasks)
        to_come = [shares for until, shares in self._phases if step < until * self._num_steps_of_stage - ROUNDING]
        return to_come[0] if to_come else self._phases[-1][1]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "difficulty" in self.signals:
            difficulties_T = [value for value in self.signals["difficulty"] if value is not None]
            self._phases = phases_of_order(order_of_difficulty(difficulties_T), self._overlap)


def phases_of_order(order: Sequence[int], overlap: float) -> list[tuple[float, NDArray[np.float64]]]:
    """A phase for each task, in which it has the weight 1 and those before it ``overlap``."""
    num_tasks = len(order)
    phases = []
    for rank, task in enumerate(order):
        weights_T = np.zeros(num_tasks)
        weights_T[list(order[:rank])] = overlap
        weights_T[task] = 1
        phases.append(((rank + 1) / num_tasks, weights_T / weights_T.sum()))
    return phases


def order_of_difficulty(losses_T: Sequence[float]) -> list[int]:
    """The tasks with the lowest losses first; of equal ones, the first."""
    return [int(task) for task in np.argsort(losses_T, kind="stable")]


def order_of_names(order: str | Sequence[str], names: Sequence[str] | None) -> list[int]:
    """Indices of the tasks in this order; raises ``ValueError`` unless it names each of them once."""
    if isinstance(order, str):
        raise ValueError(f'order: must be "difficulty" or a list of tasks, found {order!r}; take one of them')
    if names is None:
        raise ValueError("names: must be given to read the order, found None; pass the tasks' names")
    if sorted(order) != sorted(names):
        raise ValueError(f"order: must name every task once, found {list(order)}; the tasks are {list(names)}")
    return [list(names).index(name) for name in order]


def phases_of_schedule(
    schedule: Sequence[Mapping[str, Any]], names: Sequence[str] | None, num_tasks: int
) -> list[tuple[float, NDArray[np.float64]]]:
    """Reads a schedule; raises ``ValueError`` where it breaks a rule."""
    phases: list[tuple[float, NDArray[np.float64]]] = []
    for entry in schedule:
        if set(entry) != {"until", "weights"}:
            raise ValueError(f"schedule: every entry must have until and weights, found {sorted(entry)}; correct it")
        weights_T = np.array(value_of_each_task("schedule", entry["weights"], names, num_tasks, default=0.0))
        if not (weights_T >= 0).all() or not 0 < weights_T.sum() < math.inf:
            raise ValueError(
                f"schedule: weights must be finite, not negative, not all 0, found {weights_T.tolist()}; correct them"
            )
        phases.append((float(entry["until"]), weights_T / weights_T.sum()))
    untils = [until for until, _ in phases]
    if not untils or untils != sorted(set(untils)) or untils[0] <= 0 or untils[-1] != 1:
        raise ValueError(f"schedule: until must ascend from above 0 to 1, found {untils}; it is a share of the stage")
    return phases
