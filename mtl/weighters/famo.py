"""Weights that let all losses fall at one rate. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.adam import TaskAdam
from mtl.weighters.loss_floor import check_min_loss, floored
from mtl.weighters.scale import redistributed


def famo_weights(logit_M: Tensor, losses_M: Tensor) -> Tensor:
    """``c z_i / L_i`` with ``z = softmax(logit)`` and c such that they sum to 1 [M]."""
    return torch.softmax(logit_M - losses_M.log(), dim=0)


def famo_gradient(logit_M: Tensor, losses_before_M: Tensor, losses_after_M: Tensor, gamma: float) -> Tensor:
    """``J^T delta + gamma logit`` [M], with J the Jacobian of the softmax and delta the decrease of the log losses."""
    share_M = torch.softmax(logit_M, dim=0)
    decrease_M = losses_before_M.log() - losses_after_M.log()
    return share_M * (decrease_M - share_M @ decrease_M) + gamma * logit_M


class FAMO:
    """Fast adaptive multitask optimization: the task whose log loss falls least gains weight.

    The model's step is on ``sum_i c z_i log L_i``, so ``lambda_i ~ z_i / L_i`` with ``z = softmax(logits)``: the
    direction does not depend on the scales of the losses. After it, the losses of the same examples tell how much each
    log loss fell, and the logits take one step of Adam against ``J^T delta``, which lowers that of the fastest task.

    Only present tasks take part: the softmax and its Jacobian are over these, they share out what weight they had, and
    absent ones keep logit, moments and weight. A task whose loss is at the floor has nothing left to lose; it would
    look slow and gain weight without end, so its logit rests, and so do all where fewer than two can be compared.

    Source: Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, Algorithm 1, with Adam for the
    logits as in the authors' code. There the weights ``c z_i / L_i`` sum to 1; here they have mean 1.

    Args:
        num_tasks: Number of tasks T.
        learning_rate: Adam's step size for the logits, about their change in one step.
        gamma: Weight decay of the logits, added to their gradient; at least 0. Larger ones forget earlier steps sooner.
        min_loss: Losses below it count as it [nats per target token]; keeps memorised tasks from taking all weight.

    Raises:
        ValueError: If an argument is outside its range.
    """

    needs: frozenset[str] = frozenset({"losses", "losses_after"})

    def __init__(
        self, num_tasks: int, learning_rate: float = 0.025, gamma: float = 1e-3, min_loss: float = 0.05
    ) -> None:
        if not gamma >= 0:
            raise ValueError(f"gamma: must be at least 0, found {gamma}; 0.001 is the paper's")
        check_min_loss(min_loss)
        self._gamma = gamma
        self._min_loss = min_loss
        self._adam = TaskAdam(num_tasks, learning_rate)
        self._logit_T = torch.zeros(num_tasks, dtype=torch.float64)
        self._weight_T = torch.ones(num_tasks, dtype=torch.float64)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        if feedback is None:
            return self._weight_T.clone()
        losses_M = floored(feedback.losses_M, self._min_loss)
        raw_M = famo_weights(self._logit_T[list(feedback.tasks)], losses_M)
        return redistributed(self._weight_T, feedback.tasks, raw_M)

    def update(self, feedback: TaskFeedback) -> None:
        """Remembers the step's weights, and moves the logits by what the step did to the losses."""
        if not feedback.tasks:
            return
        assert feedback.losses_after_M is not None, "the weighter declares that it needs losses_after"
        self._weight_T = self.weights(feedback)
        before_M = floored(feedback.losses_M, self._min_loss)
        after_M = floored(feedback.losses_after_M, self._min_loss)
        learning_M = before_M > self._min_loss
        tasks = [task for task, learning in zip(feedback.tasks, learning_M.tolist(), strict=True) if learning]
        if len(tasks) < 2:
            return
        gradient_M = famo_gradient(self._logit_T[tasks], before_M[learning_M], after_M[learning_M], self._gamma)
        self._logit_T[tasks] -= self._adam.step(tasks, gradient_M)

    def state_dict(self) -> dict[str, Any]:
        return {"logit": self._logit_T.clone(), "weight": self._weight_T.clone(), **self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._logit_T.copy_(state["logit"])
        self._weight_T.copy_(state["weight"])
        self._adam.load_state_dict(state)
