"""Surgery on parts of the gradients. Shape suffixes: M present tasks, N shared trainable parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import GradientSurgery


class Grouped:
    """Surgery on each group of parameters by itself, so that tasks may agree in one layer and fight in another.

    Each group has a surgery, with state, of its own. There are no coefficients of whole rows.

    Source: the granularities of Wang et al., "Gradient Vaccine", ICLR 2021, sec. 3.2.

    Args:
        make: Makes a group's surgery.
        sizes: Parameters of each group, in the order of the columns.
    """

    def __init__(self, make: Callable[[], GradientSurgery], sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)
        self._parts = [make() for _ in sizes]
        self.weights_act = self._parts[0].weights_act

    def __call__(self, grads_MN: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        groups = grads_MN.split(self._sizes, dim=1)
        return torch.cat([part(group, tasks) for part, group in zip(self._parts, groups, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        return {str(index): part.state_dict() for index, part in enumerate(self._parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, part in enumerate(self._parts):
            part.load_state_dict(state[str(index)])
