"""Weights by how far losses have come since the start. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.loss_floor import check_min_loss, floored
from mtl.weighters.scale import redistributed


class ProgressRule(ABC):
    """``lambda_t ~ rule(r)_t / e_t``: weights of log losses, by the progress ``r_t = e_t / early e_t``.

    ``e_t = L_t - ideal_t`` is the loss of the step that the weights are for, and its early value the mean over the
    task's first ``warmup`` steps. Until it is known, ``r_t = 1``. The present tasks share out among them what weight
    they had; an absent task keeps its own.

    Args:
        ideal_T: Loss at which a task has nothing left to learn [nats per target token].
        warmup: Steps with the task whose mean loss is its start.
        min_loss: Least ``e_t`` [nats per target token]; smaller ones count as it.

    Raises:
        ValueError: If the warm-up is below 1, or ``min_loss`` not above 0.
    """

    needs: frozenset[str] = frozenset({"losses"})

    def __init__(self, ideal_T: Tensor, warmup: int, min_loss: float) -> None:
        if warmup < 1:
            raise ValueError(f"warmup: must be at least 1 step with the task, found {warmup}; 50 averages out noise")
        check_min_loss(min_loss)
        self._ideal_T = ideal_T
        self._warmup = warmup
        self._min_loss = min_loss
        self._weight_T = torch.ones_like(ideal_T)
        self._early_sum_T = torch.zeros_like(ideal_T)
        self._num_early_T = torch.zeros(len(ideal_T), dtype=torch.int64)

    @abstractmethod
    def rule(self, progress_M: Tensor) -> Tensor:
        """The weights of the present tasks' log losses [M], up to a common factor."""

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        if feedback is None:
            return self._weight_T.clone()
        excess_M = self._excess(feedback)
        progress_M = excess_M / self._early_mean(feedback.tasks, excess_M)
        return redistributed(self._weight_T, feedback.tasks, self.rule(progress_M) / excess_M)

    def update(self, feedback: TaskFeedback) -> None:
        """Remembers the step's weights, for the tasks that will be absent, and the losses of a task's warm-up."""
        self._weight_T = self.weights(feedback)
        present = torch.tensor(list(feedback.tasks), dtype=torch.int64)
        early_M = self._num_early_T[present] < self._warmup
        self._early_sum_T[present] += torch.where(early_M, self._excess(feedback), 0.0)
        self._num_early_T[present] += early_M

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": self._weight_T.clone(),
            "early_sum": self._early_sum_T.clone(),
            "num_early": self._num_early_T.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight_T.copy_(state["weight"])
        self._early_sum_T.copy_(state["early_sum"])
        self._num_early_T.copy_(state["num_early"])

    def _excess(self, feedback: TaskFeedback) -> Tensor:
        return floored(feedback.losses_M.to("cpu") - self._ideal_T[list(feedback.tasks)], self._min_loss)

    def _early_mean(self, tasks: Sequence[int], excess_M: Tensor) -> Tensor:
        present = torch.tensor(list(tasks), dtype=torch.int64)
        known_M = self._num_early_T[present] == self._warmup
        return torch.where(known_M, self._early_sum_T[present] / self._warmup, excess_M)
