"""How an adversary moves its weights towards the tasks that are worst off. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.weighters.scale import redistributed


def check_step(eta: float, floor: float) -> None:
    """Raises ``ValueError`` unless the step size is above 0 and the floor a share."""
    if not eta > 0:
        raise ValueError(f"eta: must be above 0, found {eta}; for fixed weights use weighter=equal")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: must be a share in [0, 1], found {floor}; 0.01 spreads 1 % evenly in every step")


def exponentiated(weight_T: Tensor, tasks: Sequence[int], gain_M: Tensor, floor: float) -> Tensor:
    """One step of exponentiated gradient ascent: ``lambda <- (1 - floor) c lambda exp(gain) + floor mean(lambda)``.

    Only the present tasks' weights change. They share out what they had (c), so with all tasks present and floor 0,
    ``lambda / T`` is the maximiser of ``<q, gain> - KL(q | lambda / T)`` on the simplex.
    """
    if not len(gain_M):
        return weight_T.clone()
    present = torch.tensor(list(tasks), dtype=torch.int64)
    even = weight_T[present].mean()
    moved_T = redistributed(weight_T, tasks, weight_T[present] * torch.exp(gain_M - gain_M.max()))
    moved_T[present] += floor * (even - moved_T[present])
    return moved_T
