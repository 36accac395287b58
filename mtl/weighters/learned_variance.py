"""Weights by a learned variance of each task. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.adam import TaskAdam


class LearnedVariance(ABC):
    """``lambda = T exp(-s) / sum exp(-s)``, with log-variances ``s`` that a method's own objective moves.

    They start at 0 and are stepped by Adam of their own, without decay, clipping or schedule. An absent task's
    log-variance and moments stay as they are; its weight moves only as far as the weights' mean of 1 asks for.

    Args:
        num_tasks: Number of tasks T.
        learning_rate: Adam's step size for ``s``, about its change in one step while the losses keep their side of the
            optimum. 0.025 takes ``s`` across the range of usual losses in some 50 steps, and averages over as many.
        max_log_variance: Bound on ``|s|``: 2.5 bounds ratios of weights by 148.

    Raises:
        ValueError: If the learning rate or the bound is not above 0.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, num_tasks: int, learning_rate: float = 0.025, max_log_variance: float = 2.5) -> None:
        self._adam = TaskAdam(num_tasks, learning_rate)
        if not max_log_variance > 0:
            raise ValueError(
                f"max_log_variance: must be above 0, found {max_log_variance}; 2.5 bounds weight ratios by 148"
            )
        self._max_log_variance = max_log_variance
        self._log_variance_T = torch.zeros(num_tasks, dtype=torch.float64)

    @abstractmethod
    def gradient(self, log_variance_M: Tensor, losses_M: Tensor) -> Tensor:
        """The gradient of the objective with respect to the present tasks' log-variances [M]."""

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return len(self._log_variance_T) * torch.softmax(-self._log_variance_T, dim=0)

    def update(self, feedback: TaskFeedback) -> None:
        """Steps the log-variances of the present tasks."""
        present = torch.tensor(list(feedback.tasks), dtype=torch.int64)
        log_variance_M = self._log_variance_T[present]
        gradient_M = self.gradient(log_variance_M, feedback.losses_M.detach().to("cpu", torch.float64))
        log_variance_M = log_variance_M - self._adam.step(feedback.tasks, gradient_M)
        self._log_variance_T[present] = log_variance_M.clamp(-self._max_log_variance, self._max_log_variance)

    def state_dict(self) -> dict[str, Any]:
        return {"log_variance": self._log_variance_T.clone(), **self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_variance_T.copy_(state["log_variance"])
        self._adam.load_state_dict(state)
