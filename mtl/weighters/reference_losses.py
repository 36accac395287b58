"""Losses to measure tasks against, from the config. Shape suffix: T tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def loss_of_each_task(
    parameter: str,
    losses: float | Mapping[str, float],
    names: Sequence[str] | None,
    num_tasks: int,
    default: float | None = 0.0,
) -> Tensor:
    """Reads one loss for all tasks, or a mapping from task name, as losses of each [T], in nats per target token.

    Args:
        parameter: What the losses are called, for messages.
        losses: Finite and at least 0.
        names: Names of the T tasks; needed to read a mapping.
        num_tasks: Number of tasks T.
        default: Loss of the tasks that a mapping does not name; ``None`` if it must name them all.

    Raises:
        ValueError: If a loss is out of range, or a name is unknown or missing.
    """
    if isinstance(losses, Mapping):
        if names is None:
            raise ValueError(
                f"names: must be given to read {parameter} by task name, found None; pass the tasks' names"
            )
        known = list(names)
        unknown = [name for name in losses if name not in known]
        if unknown:
            raise ValueError(f"{parameter}: must name tasks of the run, found {unknown[0]!r}; the tasks are {known}")
        missing = [name for name in known if name not in losses]
        if missing and default is None:
            raise ValueError(
                f"{parameter}: must give every task's loss, found none for {missing[0]!r}; take the validation loss "
                "that training on the task alone reaches"
            )
        loss_T = [float(losses.get(name, default or 0.0)) for name in known]
    else:
        loss_T = [float(losses)] * num_tasks
    for loss in loss_T:
        if not 0 <= loss < math.inf:
            raise ValueError(
                f"{parameter}: must be finite and not negative, found {loss}; losses are in nats per token"
            )
    return torch.tensor(loss_T, dtype=torch.float64)
