"""Surgery on gradients of one length. Shape suffix: M present tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.surgery.cr_mogm import check_inner
from mtl.surgery.gramian import GramianSurgery


class Normalized(GramianSurgery):
    """Another surgery on gradients that are all brought to their mean length, so that none rules by its size.

    The idea of GradNorm (Chen et al., ICML 2018) at once and without weights to learn: loss weights do nothing.

    Args:
        inner: The surgery to apply.

    Raises:
        ValueError: If the surgery does not work by coefficients.
    """

    weights_act = "no"

    def __init__(self, inner: GramianSurgery) -> None:
        check_inner(inner)
        self._inner = inner

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        gramian_MM = gramian_MM.detach().to("cpu", torch.float64)
        norms_M = gramian_MM.diagonal().sqrt()
        factors_M = torch.where(norms_M > 0, norms_M.mean() / norms_M, torch.ones_like(norms_M))
        return factors_M * self._inner.coefficients(factors_M[:, None] * gramian_MM * factors_M, tasks)

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)
