"""Weights of 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback


class Equal:
    """Every task's loss counts 1.

    Args:
        num_tasks: Number of tasks T.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return torch.ones(self._num_tasks, dtype=torch.float64)

    def update(self, feedback: TaskFeedback) -> None:
        """Does nothing: the weights are fixed."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: there is no state."""
