"""What surgery remembers of its coefficients. Shape suffixes: M present tasks, T tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TaskCoefficients:
    """A coefficient of each task, comparable between steps of different M: ``M w_t``, 1 for the mean of the rows."""

    def __init__(self) -> None:
        self._value_T = torch.zeros(0, dtype=torch.float64)

    def of(self, tasks: Sequence[int]) -> Tensor:
        """Those of the tasks [M]; NaN where there has been none."""
        self._make_room(tasks)
        return self._value_T[list(tasks)] / len(tasks)

    def keep(self, tasks: Sequence[int], coefficients_M: Tensor) -> None:
        """Replaces those of the tasks."""
        self._make_room(tasks)
        self._value_T[list(tasks)] = coefficients_M * len(tasks)

    def _make_room(self, tasks: Sequence[int]) -> None:
        missing = max(tasks) + 1 - len(self._value_T)
        if missing > 0:
            self._value_T = torch.cat([self._value_T, torch.full((missing,), torch.nan, dtype=torch.float64)])

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._value_T.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._value_T = state["values"].clone()
