"""Smoothed surgery. Shape suffix: M present tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.task_coefficients import TaskCoefficients


class CRMOGM(GramianSurgery):
    """Another surgery's coefficients as exponential means: ``lambda = alpha lambda + (1 - alpha) w``.

    Takes the noise of single steps out of them. A task's first coefficient is taken whole, an absent task's stays.

    Source: Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond", NeurIPS
    2022, Algorithm 1; with a constant alpha.

    Args:
        inner: The surgery to smooth.
        alpha: Share of the old mean, in [0, 1).

    Raises:
        ValueError: If alpha is outside its range, or the surgery does not work by coefficients.
    """

    def __init__(self, inner: GramianSurgery, alpha: float = 0.9) -> None:
        check_inner(inner)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha: must be in [0, 1), found {alpha}; 0.9 averages about 10 steps")
        self._inner = inner
        self._alpha = alpha
        self._means = TaskCoefficients()
        self.weights_act = inner.weights_act

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        tasks = range(len(gramian_MM)) if tasks is None else tasks
        newest_M = self._inner.coefficients(gramian_MM, tasks)
        old_M = self._means.of(tasks)
        smooth_M = torch.where(old_M.isnan(), newest_M, self._alpha * old_M + (1 - self._alpha) * newest_M)
        self._means.keep(tasks, smooth_M)
        return smooth_M

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self._inner.state_dict(), "means": self._means.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state["inner"])
        self._means.load_state_dict(state["means"])


def check_inner(inner: object) -> None:
    """Raises ``ValueError`` unless it is surgery that works by coefficients."""
    if not isinstance(inner, GramianSurgery):
        raise ValueError(
            f"inner: must be surgery that works by coefficients, found {type(inner).__name__}; take mtl.surgery.MGDA "
            "or another one of them"
        )
