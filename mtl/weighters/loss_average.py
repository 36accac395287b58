"""What weighters remember of the tasks' losses. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback


class LossAverage:
    """Exponential mean of each task's loss over the steps that it was present in, without the bias of its start.

    Args:
        num_tasks: Number of tasks T.
        smoothing: Decay in [0, 1) per step with the task; 0 keeps the newest loss only.
    """

    def __init__(self, num_tasks: int, smoothing: float) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: must be in [0, 1), found {smoothing}; 0.9 averages about 10 steps")
        self._smoothing = smoothing
        self._sum_T = torch.zeros(num_tasks, dtype=torch.float64)
        self._weight_T = torch.zeros(num_tasks, dtype=torch.float64)

    def add(self, tasks: Sequence[int], losses_M: Tensor) -> None:
        """Takes in a step's losses; absent tasks' means stay as they are."""
        present = torch.tensor(list(tasks), dtype=torch.int64)
        losses_M = losses_M.detach().to("cpu", torch.float64)
        self._sum_T[present] = self._smoothing * self._sum_T[present] + (1 - self._smoothing) * losses_M
        self._weight_T[present] = self._smoothing * self._weight_T[present] + (1 - self._smoothing)

    @property
    def seen(self) -> list[int]:
        """Tasks that have had a loss."""
        return [int(task) for task in self._weight_T.nonzero()]

    @property
    def mean_T(self) -> Tensor:
        """The means; NaN for a task that has had no loss."""
        return self._sum_T / self._weight_T

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum_T.clone(), "weight": self._weight_T.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum_T.copy_(state["sum"])
        self._weight_T.copy_(state["weight"])


class InitialLosses:
    """``L_t(0)``: the validation loss before training, or the first training loss where there was no such evaluation.

    Args:
        num_tasks: Number of tasks T.
    """

    def __init__(self, num_tasks: int) -> None:
        self._loss_T: list[float | None] = [None] * num_tasks

    def add(self, feedback: TaskFeedback) -> None:
        """Keeps what comes first of each task."""
        validation: Mapping[int, Mapping[str, float]] = feedback.validation or {}
        found = {task: scores["loss"] for task, scores in validation.items() if "loss" in scores}
        found |= dict(zip(feedback.tasks, feedback.losses_M.tolist(), strict=True))
        for task, loss in found.items():
            if self._loss_T[task] is None and math.isfinite(loss):
                self._loss_T[task] = float(loss)

    @property
    def loss_T(self) -> Tensor:
        """The losses; NaN where there has been none yet."""
        return torch.tensor([math.nan if loss is None else loss for loss in self._loss_T], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._loss_T)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loss_T = list(state["losses"])
