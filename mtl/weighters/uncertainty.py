"""Weights learned with the model. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Uncertainty:
    """Weighs each task by a learned precision: ``lambda = T exp(-s) / sum exp(-s)``.

    The log-variances ``s`` minimise ``sum_t exp(-s_t) L_t + s_t / 2`` over the unweighted losses, so their gradient is
    ``1/2 - exp(-s_t) L_t`` in closed form and the optimum ``s_t = log(2 L_t)`` gives ``lambda_t ~ 1 / L_t``: the scale
    of a task's loss cancels. They are stepped by Adam of their own, without decay, clipping or schedule; an absent
    task's log-variance and moments stay as they are.

    Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018, Eq. 10
    (classification term), with the weights normalised to mean 1 so that they are no learning rate schedule.

    Args:
        num_tasks: Number of tasks T.
        learning_rate: Adam's step size for ``s``, about its change in one step while the losses keep their side of the
            optimum. 0.025 takes ``s`` across the range of usual losses in some 50 steps, and averages over as many.
        max_log_variance: Bound on ``|s|``. A memorised task's loss goes to 0 and its weight would explode as ``1 / L``;
            2 treats losses below 0.07 and above 3.7 nats per token as these, and bounds ratios of weights by 55.

    Raises:
        ValueError: If the learning rate or the bound is not above 0.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, num_tasks: int, learning_rate: float = 0.025, max_log_variance: float = 2.0) -> None:
        if not learning_rate > 0:
            raise ValueError(
                f"learning_rate: must be above 0, found {learning_rate}; for fixed weights use weighter=equal"
            )
        if not max_log_variance > 0:
            raise ValueError(
                f"max_log_variance: must be above 0, found {max_log_variance}; 2 bounds weight ratios by 55"
            )
        self._learning_rate = learning_rate
        self._max_log_variance = max_log_variance
        self._log_variance_T = torch.zeros(num_tasks, dtype=torch.float64)
        self._exp_avg_T = torch.zeros(num_tasks, dtype=torch.float64)
        self._exp_avg_sq_T = torch.zeros(num_tasks, dtype=torch.float64)
        self._num_steps_T = torch.zeros(num_tasks, dtype=torch.int64)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return len(self._log_variance_T) * torch.softmax(-self._log_variance_T, dim=0)

    def update(self, feedback: TaskFeedback) -> None:
        """Steps the log-variances of the present tasks by Adam, each with its own step count."""
        tasks = torch.tensor(feedback.tasks, dtype=torch.int64)
        losses_M = feedback.losses_M.detach().to("cpu", torch.float64)
        log_variance_M = self._log_variance_T[tasks]
        gradient_M = 0.5 - torch.exp(-log_variance_M) * losses_M

        num_steps_M = self._num_steps_T[tasks] + 1
        steps_M = num_steps_M.to(torch.float64)  # a float to the power of an integer tensor would be float32
        exp_avg_M = BETA1 * self._exp_avg_T[tasks] + (1 - BETA1) * gradient_M
        exp_avg_sq_M = BETA2 * self._exp_avg_sq_T[tasks] + (1 - BETA2) * gradient_M**2
        mean_M = exp_avg_M / (1 - BETA1**steps_M)
        rms_M = torch.sqrt(exp_avg_sq_M / (1 - BETA2**steps_M))
        log_variance_M = log_variance_M - self._learning_rate * mean_M / (rms_M + EPS)

        self._log_variance_T[tasks] = log_variance_M.clamp(-self._max_log_variance, self._max_log_variance)
        self._exp_avg_T[tasks] = exp_avg_M
        self._exp_avg_sq_T[tasks] = exp_avg_sq_M
        self._num_steps_T[tasks] = num_steps_M

    def state_dict(self) -> dict[str, Any]:
        return {
            "log_variance": self._log_variance_T.clone(),
            "exp_avg": self._exp_avg_T.clone(),
            "exp_avg_sq": self._exp_avg_sq_T.clone(),
            "num_steps": self._num_steps_T.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_variance_T.copy_(state["log_variance"])
        self._exp_avg_T.copy_(state["exp_avg"])
        self._exp_avg_sq_T.copy_(state["exp_avg_sq"])
        self._num_steps_T.copy_(state["num_steps"])
