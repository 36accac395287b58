"""A floor under losses. Shape suffix: M present tasks.

A memorised or nearly deterministic task's loss goes to 0. Its inverse and its logarithm then explode, and a weighter
that goes by them would give the run to the one task that has nothing left to learn.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_min_loss(min_loss: float) -> None:
    """Raises ``ValueError`` unless the floor is above 0."""
    if not min_loss > 0:
        raise ValueError(f"min_loss: must be above 0 nats per token, found {min_loss}; 0.05 takes smaller ones as 0.05")


def floored(losses_M: Tensor, min_loss: float) -> Tensor:
    """The losses, none below the floor, detached, in float64 on the CPU."""
    return losses_M.detach().to("cpu", torch.float64).clamp(min=min_loss)
