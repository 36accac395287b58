"""Random weights. Shape suffix: T tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback


class RLW:
    """Draws every step's weights anew: ``lambda = T softmax(z)`` with ``z ~ N(0, I)``, so that their expectation is 1.

    The baseline for every other weighter: one that does not beat it has learned nothing about the tasks.

    Source: Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning", TMLR 2022
    (random loss weighting with normal draws), times T.

    Args:
        num_tasks: Number of tasks T.
        seed: Seed of the draws, which come from a generator of its own.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, num_tasks: int, seed: int = 0) -> None:
        self._num_tasks = num_tasks
        self._generator = torch.Generator().manual_seed(seed)
        self._weight_T = self._draw()

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return self._weight_T.clone()

    def update(self, feedback: TaskFeedback) -> None:
        """Draws the weights of the next step."""
        if feedback.tasks:
            self._weight_T = self._draw()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "weight": self._weight_T.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._weight_T.copy_(state["weight"])

    def _draw(self) -> Tensor:
        normal_T = torch.randn(self._num_tasks, dtype=torch.float64, generator=self._generator)
        return self._num_tasks * torch.softmax(normal_T, dim=0)
