"""Surgery that is solved now and then. Shape suffix: M present tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mtl.surgery.cr_mogm import check_inner
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.task_coefficients import TaskCoefficients


class Every(GramianSurgery):
    """Another surgery's coefficients, solved for at every k-th call and kept in between.

    A call with a task that has no coefficient yet is solved, too.

    Args:
        inner: The surgery to solve.
        every: k, at least 1.

    Raises:
        ValueError: If k is below 1, or the surgery does not work by coefficients.
    """

    def __init__(self, inner: GramianSurgery, every: int) -> None:
        check_inner(inner)
        if every < 1:
            raise ValueError(f"every: must be at least 1, found {every}; 1 solves at every step")
        self._inner = inner
        self._every = every
        self._num_calls = 0
        self._kept = TaskCoefficients()
        self.weights_act = inner.weights_act

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        tasks = range(len(gramian_MM)) if tasks is None else tasks
        due = self._num_calls % self._every == 0
        self._num_calls += 1
        if due or self._kept.of(tasks).isnan().any():
            self._kept.keep(tasks, self._inner.coefficients(gramian_MM, tasks))
        return self._kept.of(tasks)

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self._inner.state_dict(),
            "num_calls": self._num_calls,
            "kept": self._kept.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state["inner"])
        self._num_calls = state["num_calls"]
        self._kept.load_state_dict(state["kept"])
