"""The scale of loss weights: mean 1 over the tasks, so that no weighter is a learning rate schedule.

Shape suffixes: T tasks, M present tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_one(raw_T: Tensor) -> Tensor:
    """The weights in their proportions, with mean 1; of weights that are all 0, ones."""
    mean = raw_T.mean()
    return raw_T / mean if mean > 0 else torch.ones_like(raw_T)


def redistributed(weight_T: Tensor, tasks: Sequence[int], raw_M: Tensor) -> Tensor:
    """New weights [T] in the proportions of ``raw_M``, where only the present tasks' weights change.

    They share what they had together, so that an absent task keeps its weight and the mean stays 1.
    """
    present = torch.tensor(list(tasks), dtype=torch.int64)
    changed_T = weight_T.clone()
    if len(present):
        changed_T[present] = mean_one(raw_M) * weight_T[present].mean()
    return changed_T
