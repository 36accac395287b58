"""Surgery by projection. Shape suffix: M present tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.scale import Scale, check_scale


def project(gramian_MM: Tensor, orders: Tensor) -> Tensor:
    """Projects every row onto the normal plane of the rows that it conflicts with, one after the other.

    The result is a matrix C [M, M]: the projected row i is ``C_i^T J``. Starting from ``c = e_i``, each j in
    ``orders[i]`` with ``(G c)_j < 0`` subtracts ``(G c)_j / G_jj`` from ``c_j``. The targets of the projections are the
    original rows, never projected ones. All i advance together; cost O(M^3).

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1, in terms of ``G = J J^T``.

    Args:
        gramian_MM: Gramian of the rows, float64.
        orders: For each row, the other rows in the order in which it meets them [M, M-1].
    """
    # In numpy: torch would share each of the M - 1 small steps out among its threads, and wait for them.
    inner_MM, rows = gramian_MM.numpy(), np.arange(len(gramian_MM))
    norms_squared_M = inner_MM.diagonal()
    coefficients_MM = np.eye(len(inner_MM))
    products_MM = inner_MM.copy()  # [i, j]: inner product of the row i as projected so far with the original row j
    with np.errstate(over="ignore", invalid="ignore"):  # as torch does: the caller looks at what comes out
        for others in orders.numpy().T:
            products_M, squares_M = products_MM[rows, others], norms_squared_M[others]
            # A row so small that its square underflows has no direction left to project out.
            conflicting = (products_M < 0) & (squares_M > 0)
            steps_M = np.zeros(len(rows))
            steps_M[conflicting] = -products_M[conflicting] / squares_M[conflicting]
            coefficients_MM[rows, others] += steps_M
            products_MM += steps_M[:, None] * inner_MM[others]
    return torch.from_numpy(coefficients_MM)


def random_orders(num_rows: int, generator: torch.Generator) -> Tensor:
    """Draws for each row, independently, a uniformly random order of the other rows [M, M-1]."""
    keys_MM = torch.rand(num_rows, num_rows, dtype=torch.float64, generator=generator)
    keys_MM.fill_diagonal_(1.0)  # sorted last, and cut off: a row never meets itself
    return keys_MM.argsort(dim=1)[:, :-1]


class PCGrad(GramianSurgery):
    """Projects conflicting gradients onto each other's normal plane and adds them up.

    Every row meets the others in a random order of its own. Coefficients are at least 1 (``"paper"``), and rows without
    conflict are just added. Loss weights commute with it: the projection of a row of twice the length is twice as long.
    For more than two tasks the result may still conflict with a task.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1.

    Args:
        seed: Seed of the orders; draws come from a generator of its own.
        scale: ``"mean"`` divides the paper's sum by M, so that equal rows give that row; ``"paper"`` leaves the sum.

    Raises:
        ValueError: If the scale is another word.
    """

    weights_act = "yes"

    def __init__(self, seed: int = 0, scale: Scale = "mean") -> None:
        check_scale(scale)
        self._scale = scale
        self._generator = torch.Generator().manual_seed(seed)

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        gramian_MM = gramian_MM.detach().to("cpu", torch.float64)
        num_rows = len(gramian_MM)
        sum_M = project(gramian_MM, random_orders(num_rows, self._generator)).sum(dim=0)
        return sum_M / num_rows if self._scale == "mean" else sum_M

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
