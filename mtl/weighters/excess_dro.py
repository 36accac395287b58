"""Weights by how far tasks are behind a reference. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.exponentiated import check_step, exponentiated
from mtl.weighters.reference_losses import loss_of_each_task


class ExcessDRO:
    """DoReMi's rule as loss weights: weight moves to the tasks with the largest excess over a reference loss.

    Every step takes ``lambda_t <- lambda_t exp(eta max(L_t - reference_t, 0))``, up to the scale, then spreads the
    share ``floor`` evenly. Entropy that no model can reduce is in both losses and cancels. A task at or below its
    reference gains nothing, however low its loss gets; once all are there, the floor leads the weights back to equal.

    Source: the proxy model's objective of Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model
    Pretraining", NeurIPS 2023, Algorithm 1, with the paper's step size. Deviations: the reference is one loss per task,
    so the excess is cut off at 0 for the task and not for every token; weights have mean 1 instead of sum 1; they act
    from the next step on, so that no task's gradient has to be kept apart; absent tasks keep their weights.

    Args:
        num_tasks: Number of tasks T.
        references: Loss to reach [nats per target token]: a mapping that has every task's name, such as validation
            losses of single-task runs; or one for all, where nothing better is known.
        names: Names of the T tasks; needed to read a mapping.
        eta: Step size of the weights' logarithms per nat of excess, above 0. The paper's 1 moves weights by a factor of
            e in one step; 0.01 to 0.1 averages out the noise of small batches.
        floor: The paper's smoothing c: share of the present tasks' weight that is spread evenly over them in every
            step, in [0, 1]. While all are present, no weight falls below it.

    Raises:
        ValueError: If an argument is outside its range, a task has no reference, or a reference no task.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        num_tasks: int,
        references: float | Mapping[str, float],
        names: Sequence[str] | None = None,
        eta: float = 1.0,
        floor: float = 1e-3,
    ) -> None:
        check_step(eta, floor)
        self._eta = eta
        self._floor = floor
        self._reference_T = loss_of_each_task("references", references, names, num_tasks, default=None)
        self._weight_T = torch.ones(num_tasks, dtype=torch.float64)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return self._weight_T.clone()

    def update(self, feedback: TaskFeedback) -> None:
        """Moves the weights of the present tasks by one step."""
        losses_M = feedback.losses_M.detach().to("cpu", torch.float64)
        excess_M = (losses_M - self._reference_T[list(feedback.tasks)]).clamp(min=0)
        self._weight_T = exponentiated(self._weight_T, feedback.tasks, self._eta * excess_M, self._floor)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight_T.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight_T.copy_(state["weight"])
