"""Surgery that does nothing. Shape suffix: M present tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl.surgery.gramian import GramianSurgery


class Mean(GramianSurgery):
    """No surgery: ``w_i = 1 / M``, the gradient of the weighted objective."""

    weights_act = "yes"

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        num_rows = len(gramian_MM)
        return torch.full((num_rows,), 1 / num_rows, dtype=torch.float64)
