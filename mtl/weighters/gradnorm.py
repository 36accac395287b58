"""Weights by gradient norms. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.adam import TaskAdam
from mtl.weighters.loss_average import InitialLosses
from mtl.weighters.loss_floor import check_min_loss, floored
from mtl.weighters.scale import redistributed


def gradnorm_gradient(weight_M: Tensor, norm_M: Tensor, ratio_M: Tensor, alpha: float) -> Tensor:
    """The gradient of ``sum_i |w_i n_i - mean(w n) r_i^alpha|`` with respect to w, the target held constant [M].

    Args:
        weight_M: Loss weights w.
        norm_M: Norms n of the unweighted gradients.
        ratio_M: Losses over initial losses; r is their ratio to their mean.
        alpha: How much slower tasks' norms are to exceed the others'.
    """
    weighted_M = weight_M * norm_M
    target_M = weighted_M.mean() * (ratio_M / ratio_M.mean()) ** alpha
    return torch.sign(weighted_M - target_M) * norm_M


class GradNorm:
    """Steers every task's weighted gradient norm to a common one, higher for tasks that have learned less.

    The target of ``w_i |g_i|`` is ``mean_j(w_j |g_j|) r_i^alpha``, where ``r_i`` is the task's loss over its initial
    loss, divided by the mean of these ratios: all over the present tasks. Each step moves the present tasks' weights
    once against the gradient of the absolute differences, then rescales them to what they had together. They hover
    around the target within some learning rates, as the gradient is a sign times ``|g_i|``.

    The norms are over all shared parameters; the paper takes the last shared layer to save time, and here the rows are
    there anyway. The step is Adam's, which does not depend on the scale of the gradients. The initial loss is that of
    the evaluation before training, or of a task's first step where there was none.

    Source: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
    ICML 2018, Eqs. 1 and 2, Algorithm 1.

    Args:
        num_tasks: Number of tasks T.
        alpha: At least 0; 0 gives all tasks one norm, larger values pull slow tasks harder.
        learning_rate: Adam's step size for the weights, about their change in one step.
        min_weight: Least weight after a step, before the rescaling; in (0, 1].
        min_loss: Losses below it count as it in ``r`` [nats per target token].

    Raises:
        ValueError: If an argument is outside its range.
    """

    needs: frozenset[str] = frozenset({"gramian"})

    def __init__(
        self,
        num_tasks: int,
        alpha: float = 1.5,
        learning_rate: float = 0.025,
        min_weight: float = 0.01,
        min_loss: float = 0.05,
    ) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha: must be at least 0, found {alpha}; 0 gives all tasks one gradient norm")
        if not 0 < min_weight <= 1:
            raise ValueError(f"min_weight: must be in (0, 1], found {min_weight}; 0.01 leaves no task without gradient")
        check_min_loss(min_loss)
        self._alpha = alpha
        self._min_weight = min_weight
        self._min_loss = min_loss
        self._weight_T = torch.ones(num_tasks, dtype=torch.float64)
        self._adam = TaskAdam(num_tasks, learning_rate)
        self._initial_losses = InitialLosses(num_tasks)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return self._weight_T.clone()

    def update(self, feedback: TaskFeedback) -> None:
        """Moves the weights of the present tasks by one step."""
        self._initial_losses.add(feedback)
        if not feedback.tasks:
            return
        assert feedback.gramian_MM is not None, "the weighter declares that it needs the gramian"
        present = torch.tensor(list(feedback.tasks), dtype=torch.int64)
        norm_M = feedback.gramian_MM.detach().to("cpu", torch.float64).diagonal().clamp(min=0).sqrt()
        initial_M = floored(self._initial_losses.loss_T[present], self._min_loss)
        ratio_M = floored(feedback.losses_M, self._min_loss) / initial_M
        gradient_M = gradnorm_gradient(self._weight_T[present], norm_M, ratio_M, self._alpha)
        moved_M = self._weight_T[present] - self._adam.step(feedback.tasks, gradient_M)
        self._weight_T = redistributed(self._weight_T, feedback.tasks, moved_M.clamp(min=self._min_weight))

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": self._weight_T.clone(),
            "initial_losses": self._initial_losses.state_dict(),
            **self._adam.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight_T.copy_(state["weight"])
        self._initial_losses.load_state_dict(state["initial_losses"])
        self._adam.load_state_dict(state)
