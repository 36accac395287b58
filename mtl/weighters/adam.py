"""The optimizer of what weighters learn. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class TaskAdam:
    """Adam on one number a task, each with its own step count: an absent task's moments stay as they are.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1.

    Args:
        num_tasks: Number of tasks T.
        learning_rate: About the change of a number in one step while its gradient keeps its sign.

    Raises:
        ValueError: If the learning rate is not above 0.
    """

    def __init__(self, num_tasks: int, learning_rate: float) -> None:
        if not learning_rate > 0:
            raise ValueError(
                f"learning_rate: must be above 0, found {learning_rate}; for fixed weights use weighter=equal"
            )
        self._learning_rate = learning_rate
        self._exp_avg_T = torch.zeros(num_tasks, dtype=torch.float64)
        self._exp_avg_sq_T = torch.zeros(num_tasks, dtype=torch.float64)
        self._num_steps_T = torch.zeros(num_tasks, dtype=torch.int64)

    def step(self, tasks: Sequence[int], gradient_M: Tensor) -> Tensor:
        """Takes in the gradient of the present tasks' numbers, and returns what to subtract from these [M]."""
        present = torch.tensor(list(tasks), dtype=torch.int64)
        num_steps_M = self._num_steps_T[present] + 1
        steps_M = num_steps_M.to(torch.float64)  # a float to the power of an integer tensor would be float32
        exp_avg_M = BETA1 * self._exp_avg_T[present] + (1 - BETA1) * gradient_M
        exp_avg_sq_M = BETA2 * self._exp_avg_sq_T[present] + (1 - BETA2) * gradient_M**2
        mean_M = exp_avg_M / (1 - BETA1**steps_M)
        rms_M = torch.sqrt(exp_avg_sq_M / (1 - BETA2**steps_M))

        self._exp_avg_T[present] = exp_avg_M
        self._exp_avg_sq_T[present] = exp_avg_sq_M
        self._num_steps_T[present] = num_steps_M
        return self._learning_rate * mean_M / (rms_M + EPS)

    def state_dict(self) -> dict[str, Any]:
        return {
            "exp_avg": self._exp_avg_T.clone(),
            "exp_avg_sq": self._exp_avg_sq_T.clone(),
            "num_steps": self._num_steps_T.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._exp_avg_T.copy_(state["exp_avg"])
        self._exp_avg_sq_T.copy_(state["exp_avg_sq"])
        self._num_steps_T.copy_(state["num_steps"])
