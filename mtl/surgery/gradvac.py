"""Surgery towards usual cosines. Shape suffixes: M present tasks, T tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.pcgrad import random_orders
from mtl.surgery.scale import Scale, check_scale


def vaccinate(gramian_MM: Tensor, orders: Tensor, usual_MM: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Turns every row to the usual cosine with each other row that it has less in common with than usual.

    The result is a matrix C [M, M], the turned row i being ``C_i^T J``, and the new usual cosines. Starting from
    ``c = e_i``, each j in ``orders[i]`` whose cosine with ``C_i^T J`` is below ``phi_ij`` has
    ``|g_i'| (phi sqrt(1 - cos^2) - cos sqrt(1 - phi^2)) / (|g_j| sqrt(1 - phi^2))`` added to ``c_j``; afterwards
    ``phi_ij`` moves by ``beta`` towards the cosine measured before. All i advance together; cost O(M^3).

    Args:
        gramian_MM: Gramian of the rows, float64.
        orders: For each row, the other rows in the order in which it meets them [M, M-1].
        usual_MM: ``phi``, below 1.
        beta: Share of the newest cosine.
    """
    inner_MM, phi_MM, rows = gramian_MM.numpy(), usual_MM.numpy().copy(), np.arange(len(gramian_MM))
    squares_M = inner_MM.diagonal()
    coefficients_MM = np.eye(len(inner_MM))
    products_MM = inner_MM.copy()  # [i, j]: inner product of the row i as turned so far with the original row j
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for others in orders.numpy().T:
            lengths_M = np.sqrt(np.maximum((coefficients_MM * products_MM).sum(axis=1), 0.0))
            products_M, others_M = products_MM[rows, others], np.sqrt(squares_M[others])
            known = (lengths_M > 0) & (squares_M[others] > 0)
            cosines_M = np.where(known, np.clip(products_M / (lengths_M * others_M), -1, 1), 0.0)
            phi_M = phi_MM[rows, others]
            turned = known & (cosines_M < phi_M)
            # PCGrad's step, plus what leads beyond the right angle.
            beyond_M = lengths_M * phi_M * np.sqrt((1 - cosines_M**2) / (1 - phi_M**2)) / others_M
            steps_M = np.zeros(len(rows))
            steps_M[turned] = beyond_M[turned] - products_M[turned] / squares_M[others][turned]
            coefficients_MM[rows, others] += steps_M
            products_MM += steps_M[:, None] * inner_MM[others]
            phi_MM[rows[known], others[known]] = (1 - beta) * phi_M[known] + beta * cosines_M[known]
    return torch.from_numpy(coefficients_MM), torch.from_numpy(phi_MM)


class GradVac(GramianSurgery):
    """Turns each task's gradient until its cosine with every other one is at least what it usually is, and adds up.

    The usual cosines ``phi`` are exponential means over the steps with both tasks, from 0; with ``beta = 0`` they stay
    there, which is PCGrad. Loss weights commute with it, as with PCGrad.

    Source: Wang et al., "Gradient Vaccine", ICLR 2021, Eq. 2 and 3, with the whole model as one group.

    Args:
        beta: Share of the newest cosine in the mean, in [0, 1].
        max_cosine: Bound on ``phi``, in [0, 1). Nearly equal tasks have cosines near 1, and turning towards these makes
            a gradient as long as ``1 / sqrt(1 - phi^2)``.
        seed: Seed of the orders; draws come from a generator of its own.
        scale: ``"mean"`` divides the paper's sum by M, so that equal rows give that row; ``"paper"`` leaves the sum.

    Raises:
        ValueError: If an argument is outside its range.
    """

    weights_act = "yes"

    def __init__(self, beta: float = 0.01, max_cosine: float = 0.9, seed: int = 0, scale: Scale = "mean") -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: must be in [0, 1], found {beta}; 0.01 averages about 100 steps")
        if not 0 <= max_cosine < 1:
            raise ValueError(f"max_cosine: must be at least 0 and below 1, found {max_cosine}; 0.9 is safe")
        check_scale(scale)
        self._beta = beta
        self._max_cosine = max_cosine
        self._scale = scale
        self._generator = torch.Generator().manual_seed(seed)
        self._usual_TT = torch.zeros(0, 0, dtype=torch.float64)

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        gramian_MM = gramian_MM.detach().to("cpu", torch.float64)
        num_rows = len(gramian_MM)
        present = torch.tensor(list(range(num_rows) if tasks is None else tasks), dtype=torch.int64)
        self._make_room(int(present.max()) + 1)
        block = torch.meshgrid(present, present, indexing="ij")
        orders = random_orders(num_rows, self._generator)
        found_MM, usual_MM = vaccinate(gramian_MM, orders, self._usual_TT[block], self._beta)
        self._usual_TT[block] = usual_MM.clamp(max=self._max_cosine)
        sum_M = found_MM.sum(dim=0)
        return sum_M / num_rows if self._scale == "mean" else sum_M

    def _make_room(self, num_tasks: int) -> None:
        known = len(self._usual_TT)
        if known < num_tasks:
            larger_TT = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
            larger_TT[:known, :known] = self._usual_TT
            self._usual_TT = larger_TT

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "usual_cosines": self._usual_TT.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._usual_TT = state["usual_cosines"].clone()
