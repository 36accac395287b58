"""Sampling by how far a task is behind a reference run. Shape suffix: T tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import TaskFeedback
from mtl.samplers.draws import checked_sizes
from mtl.samplers.moving import MovingMixture, filled, softmax, validation_losses
from mtl.samplers.values import value_of_each_task


class DoReMi(MovingMixture):
    """Samples the tasks more often that are farthest behind a reference, as a game against the worst mixture.

    Every step raises the task's weight by its excess loss ``e_t = max(L_t - reference_t, 0)``::

        alpha <- (1 - floor) softmax(log alpha + eta e) + floor / T

    and ``p`` is the mean of all alpha so far, or alpha itself. An absent task keeps its last excess loss, one not
    trained on yet has that of the evaluation before training, or else the mean of the others. All tasks start alike. A
    task's own loss level cancels against the reference, so that tasks with loss that can't be reduced are left alone.

    Source: Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", NeurIPS 2023,
    Algorithm 1. There a proxy model is trained with uniform sampling and losses weighted by alpha, and the mean of
    alpha is the mixture for another run. Here both are one run: sampling by alpha has the proxy's expected objective
    (``average=False``), and sampling by the mean, which swings less, is the paper's answer as it stands at this step.
    Further deviation: the reference is one loss per task, so the excess is cut off at 0 for the task, not per token.

    Args:
        sizes: Training examples of each task [T]; only their number matters.
        references: Loss to reach [nats per target token] of every task: a mapping from task name, or one for each task
            in order, such as the validation losses of a run with ``sampler=equal``.
        names: Names of the T tasks; needed to read a mapping.
        eta: Step size, above 0.
        floor: The paper's c, in (0, 1]: share of alpha that is spread evenly in every step.
        average: Whether p is the mean of all alpha so far.
        warmup: Steps that are drawn evenly before the probabilities move.
        smoothing: Weight of the old probabilities in every move, in [0, 1).
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If an argument is outside its range, or a task has no reference.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        references: Mapping[str, float] | Sequence[float],
        names: Sequence[str] | None = None,
        eta: float = 1.0,
        floor: float = 1e-3,
        average: bool = True,
        warmup: int = 0,
        smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        num_tasks = len(checked_sizes(sizes))
        self._references_T = value_of_each_task("references", references, names, num_tasks)
        for reference in self._references_T:
            if not 0 <= reference < math.inf:
                raise ValueError(f"references: must be losses, finite and at least 0, found {reference}; correct it")
        if not 0 < eta < math.inf:
            raise ValueError(f"eta: must be above 0 and finite, found {eta}; the paper takes 1")
        if not 0 < floor <= 1:
            raise ValueError(f"floor: must be above 0 and at most 1, found {floor}; the paper takes 0.001")
        self._eta = eta
        self._c = floor
        self._average = average
        self._excess_T: list[float | None] = [None] * num_tasks
        self._alpha_T = np.full(num_tasks, 1 / num_tasks)
        self._sum_T = np.zeros(num_tasks)
        self._num_alphas = 0
        # The floor is in alpha already.
        super().__init__(np.ones(num_tasks), warmup=warmup, smoothing=smoothing, seed=seed)

    def _shares(self, feedback: TaskFeedback) -> NDArray[np.float64] | None:
        losses = dict(zip(feedback.tasks, feedback.losses_M.tolist(), strict=True))
        untrained = {t: loss for t, loss in validation_losses(feedback).items() if self._excess_T[t] is None}
        newest = {t: max(loss - self._references_T[t], 0.0) for t, loss in (untrained | losses).items()}
        for task, excess in newest.items():
            self._excess_T[task] = excess
        if newest:
            self._note("excess_loss", newest)
        if not feedback.tasks:
            return None
        weights_T = softmax(np.log(self._alpha_T) + self._eta * filled(self._excess_T))
        self._alpha_T = (1 - self._c) * weights_T + self._c / len(weights_T)
        self._sum_T += self._alpha_T
        self._num_alphas += 1
        return self._sum_T / self._num_alphas if self._average else self._alpha_T

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "excess": list(self._excess_T),
            "alpha": self._alpha_T.tolist(),
            "sum": self._sum_T.tolist(),
            "num_alphas": self._num_alphas,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._excess_T = list(state["excess"])
        self._alpha_T = np.array(state["alpha"])
        self._sum_T = np.array(state["sum"])
        self._num_alphas = state["num_alphas"]
