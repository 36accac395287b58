"""Sampling by what a task does for the others. Shape suffix: T tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import TaskFeedback
from mtl.samplers.draws import checked_sizes
from mtl.samplers.moving import MIN_LOSS, MovingMixture, filled, softmax, validation_losses


def measured_matrix(before_T: Sequence[float], after_TT: Sequence[Sequence[float]]) -> list[list[float]]:
    """The skill matrix out of T short runs: ``A[i][j]`` is the share of task j's loss that training on i takes off.

    Where the loss does not fall, training on i is of no use to j, and the entry is 0.

    Source: Chen et al., "Skill-it!", NeurIPS 2023, the graph by brute force, with the sizes of the effects.

    Args:
        before_T: Validation loss of each task before training.
        after_TT: A row for each task: the validation losses of all tasks after a run on this one.

    Raises:
        ValueError: If a loss before training is not above 0, or there are not T rows of T losses.
    """
    before, after = np.array(before_T, np.float64), [np.array(list(row), np.float64) for row in after_TT]
    if not (before > 0).all():
        raise ValueError(f"before_T: must be losses above 0, found {before.tolist()}; leave out what is learned")
    if [len(row) for row in after] != [len(before)] * len(before):
        lengths = [len(row) for row in after]
        raise ValueError(f"after_TT: must be {len(before)} rows of as many losses, found {lengths}; one run per task")
    matrix: list[list[float]] = np.maximum((before - np.stack(after)) / before, 0.0).tolist()
    return matrix


class SkillIt(MovingMixture):
    """Samples the tasks more often that teach what is still badly known: ``s ~ exp(eta A sum L)``.

    ``A[i][j]`` says how much training on task i helps task j, and the sum is over the validation losses of the newest
    ``window`` evaluations. With A the identity every task helps itself only, and the tasks with the largest losses are
    sampled most. The first evaluation already counts, so that the tasks which help most lead from the start. A task
    that an evaluation leaves out keeps its loss; one without any has the mean of the others.

    Source: Chen et al., "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models",
    NeurIPS 2023, Algorithm 1. Deviations: losses are taken relative to those of the first evaluation, unless
    ``relative=False``, since the level of a language model's loss says more about the task than about its being
    learned; there is a floor.

    Args:
        sizes: Training examples of each task [T]; only their number matters.
        matrix: The skill matrix A, T rows of T numbers, finite; ``None`` for the identity. The paper measures it by T
            short runs, each on one task: :func:`measured_matrix` makes it of their losses.
        eta: Step size, above 0; the paper tunes it between 0.1 and 0.8.
        window: Evaluations in the sum, at least 1.
        relative: Whether losses are divided by those of the first evaluation.
        floor: Share of the examples, in [0, 1], that is spread evenly over all tasks; 0 in the paper.
        warmup: Steps that are drawn evenly before the probabilities move.
        smoothing: Weight of the old probabilities in every move, in [0, 1).
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If an argument is outside its range, or the matrix is not T by T.
    """

    needs = frozenset({"validation"})

    def __init__(
        self,
        sizes: Sequence[int],
        matrix: Sequence[Sequence[float]] | None = None,
        eta: float = 0.5,
        window: int = 3,
        relative: bool = True,
        floor: float = 0.05,
        warmup: int = 0,
        smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        num_tasks = len(checked_sizes(sizes))
        if matrix is not None and [len(row) for row in matrix] != [num_tasks] * num_tasks:
            lengths = [len(row) for row in matrix]
            raise ValueError(f"matrix: must be {num_tasks} rows of {num_tasks}, found rows of {lengths}; one per task")
        self._matrix_TT = np.eye(num_tasks) if matrix is None else np.array([list(row) for row in matrix], np.float64)
        if not np.isfinite(self._matrix_TT).all():
            raise ValueError(f"matrix: must be finite, found {self._matrix_TT.tolist()}; 0 is no effect")
        if not 0 < eta < math.inf:
            raise ValueError(f"eta: must be above 0 and finite, found {eta}; the paper takes 0.1 to 0.8")
        if window < 1:
            raise ValueError(f"window: must be at least 1 evaluation, found {window}; the paper takes 3")
        self._eta = eta
        self._window = window
        self._relative = relative
        self._initial_T: list[float | None] = [None] * num_tasks
        self._steps: list[int] = []  # of the evaluations in the window
        self._losses: list[list[float | None]] = []  # theirs, [T] each
        super().__init__(np.ones(num_tasks), floor=floor, warmup=warmup, smoothing=smoothing, seed=seed)

    def _shares(self, feedback: TaskFeedback) -> NDArray[np.float64] | None:
        losses = validation_losses(feedback)
        if not losses:
            return None
        newest_T: list[float | None] = list(self._losses[-1]) if self._losses else [None] * len(self._initial_T)
        for task, loss in losses.items():
            newest_T[task] = loss
            if self._initial_T[task] is None:
                self._initial_T[task] = loss
        if self._steps and self._steps[-1] == feedback.step:  # one evaluation may be told twice, when a stage begins
            del self._steps[-1], self._losses[-1]
        self._steps = [*self._steps, feedback.step][-self._window :]
        self._losses = [*self._losses, newest_T][-self._window :]
        rows = [self._as_measured(losses_T) for losses_T in self._losses]
        self.signals = {"loss_ratio" if self._relative else "loss": rows[-1]}
        return softmax(self._eta * self._matrix_TT @ np.sum([filled(row) for row in rows], axis=0))

    def _as_measured(self, losses_T: Sequence[float | None]) -> list[float | None]:
        return [
            None if loss is None or first is None else loss / (max(first, MIN_LOSS) if self._relative else 1.0)
            for loss, first in zip(losses_T, self._initial_T, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "initial": list(self._initial_T),
            "steps": list(self._steps),
            "losses": [list(losses_T) for losses_T in self._losses],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._initial_T = list(state["initial"])
        self._steps = list(state["steps"])
        self._losses = [list(losses_T) for losses_T in state["losses"]]
