"""Weights by a rule on the step's own losses. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.loss_floor import check_min_loss, floored
from mtl.weighters.scale import redistributed


class LossRule(ABC):
    """Weights in the proportions that a rule gives the losses of the step that they are for.

    The present tasks share out among them what weight they had; an absent task keeps its own.

    Args:
        num_tasks: Number of tasks T.
        min_loss: Losses below it count as it [nats per target token].

    Raises:
        ValueError: If ``min_loss`` is not above 0.
    """

    needs: frozenset[str] = frozenset({"losses"})

    def __init__(self, num_tasks: int, min_loss: float = 0.05) -> None:
        check_min_loss(min_loss)
        self._min_loss = min_loss
        self._weight_T = torch.ones(num_tasks, dtype=torch.float64)

    @abstractmethod
    def rule(self, losses_M: Tensor) -> Tensor:
        """The weights of the present tasks [M], up to a common factor."""

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        if feedback is None:
            return self._weight_T.clone()
        return redistributed(self._weight_T, feedback.tasks, self.rule(floored(feedback.losses_M, self._min_loss)))

    def update(self, feedback: TaskFeedback) -> None:
        """Remembers the step's weights, for the tasks that will be absent."""
        self._weight_T = self.weights(feedback)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight_T.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight_T.copy_(state["weight"])
