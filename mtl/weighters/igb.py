"""Weights by how much tasks may still improve. Shape suffix: M present tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.weighters.progress_rule import ProgressRule


def igb_weights(progress_M: Tensor) -> Tensor:
    """``M softmax(L / base)``, the weights of the log losses [M]."""
    return len(progress_M) * torch.softmax(progress_M, dim=0)


class IGB(ProgressRule):
    """Improvable gap balancing, first form: tasks that have come less far from their start get more weight.

    The log losses have the weights ``w = T softmax(L / base)``, so the losses have ``w_t / L_t``. The base is a task's
    mean loss over its warm-up; until then ``L_t / base_t`` counts as 1, so a run starts with the sum of log losses.

    Source: Dai, Fei and Lu, "Improvable Gap Balancing for Multi-Task Learning", UAI 2023, IGBv1. Deviations: the base
    is a mean over steps with the task, where the authors' code takes an early epoch; the losses' weights have mean 1.

    Args:
        num_tasks: Number of tasks T.
        warmup: Steps with the task whose mean loss is its base.
        min_loss: Losses below it count as it [nats per target token]; keeps memorised tasks from taking all weight.

    Raises:
        ValueError: If the warm-up is below 1, or ``min_loss`` not above 0.
    """

    def __init__(self, num_tasks: int, warmup: int = 50, min_loss: float = 0.05) -> None:
        super().__init__(torch.zeros(num_tasks, dtype=torch.float64), warmup, min_loss)

    def rule(self, progress_M: Tensor) -> Tensor:
        return igb_weights(progress_M)
