"""Weights from the config. Shape suffix: T tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback


class Static:
    """Every task's loss counts as given; the weights are not normalised, so doubling all doubles the objective.

    Args:
        weights: A mapping from task name (1 for tasks it does not name), or one weight for each task in order. Finite,
            not negative, not all 0; a task of weight 0 is sampled and reported but not learned.
        names: Names of the T tasks; needed to read a mapping.

    Raises:
        ValueError: If a weight is out of range, a name is unknown, or the number of weights is not that of the tasks.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, weights: Mapping[str, float] | Sequence[float], names: Sequence[str] | None = None) -> None:
        if isinstance(weights, Mapping):
            if names is None:
                raise ValueError("names: must be given to read weights by task name, found None; pass the tasks' names")
            known = list(names)
            unknown = [name for name in weights if name not in known]
            if unknown:
                raise ValueError(f"weights: must name tasks of the run, found {unknown[0]!r}; the tasks are {known}")
            weight_T = [float(weights.get(name, 1.0)) for name in known]
        else:
            weight_T = [float(weight) for weight in weights]
            if names is not None and len(weight_T) != len(names):
                raise ValueError(
                    f"weights: must be one for each of {len(names)} tasks, found {len(weight_T)}; or give them by name"
                )
        for task, weight in enumerate(weight_T):
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"weights: must be finite and not negative, found {weight} for task "
                    f"{names[task] if names else task}; 0 switches a task's loss off"
                )
        if not any(weight_T):
            raise ValueError(f"weights: must not all be 0, found {weight_T}; give at least one task a weight above 0")
        self._weight_T = torch.tensor(weight_T, dtype=torch.float64)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return self._weight_T.clone()

    def update(self, feedback: TaskFeedback) -> None:
        """Does nothing: the weights are fixed."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the weights come from the constructor."""
