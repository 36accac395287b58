"""The Gramian of the tasks' gradients, and surgery that needs nothing else.

Shape suffixes: M present tasks, N shared trainable parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Elements of the float64 copy of a piece of the rows: 32 MiB, small beside the rows, large beside the call overhead.
CHUNK_ELEMENTS = 2**22


def gramian(grads_MN: Tensor) -> Tensor:
    """Returns ``G = J J^T`` [M, M], exactly symmetric, in float64 on the CPU, whatever type and device J has.

    Products are formed and added in float64: cosines of nearly orthogonal rows would drown in float32 rounding. The
    rows are converted piece by piece, so that no float64 copy of all of J exists.
    """
    num_rows, num_parameters = grads_MN.shape
    gramian_MM = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=grads_MN.device)
    chunk = max(1, CHUNK_ELEMENTS // max(1, num_rows))
    for start in range(0, num_parameters, chunk):
        piece = grads_MN[:, start : start + chunk].detach().to(torch.float64)
        gramian_MM += piece @ piece.T
    return ((gramian_MM + gramian_MM.T) / 2).cpu()


class GramianSurgery(ABC):
    """Surgery whose result is ``w^T J``, with coefficients w that depend on the rows only through ``G = J J^T``.

    ``weights_act`` says what loss weights do through it: ``"yes"``, ``"partly"``, ``"no"`` or ``"reversed"``.
    """

    weights_act: str

    @abstractmethod
    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Returns w [M], float64 on the CPU.

        Args:
            gramian_MM: Gramian of the present tasks' rows.
            tasks: Which task each row belongs to; ``None`` for tasks 0 to M-1.
        """

    def __call__(self, grads_MN: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Returns the combined gradient ``w^T J`` [N] in the type and on the device of the rows."""
        return self.coefficients(gramian(grads_MN), tasks).to(grads_MN) @ grads_MN

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` if there is state that this method does not have."""
        if state:
            raise ValueError(
                f"surgery state: must be empty for {type(self).__name__}, found {sorted(state)}; "
                "resume with the surgery of the checkpoint"
            )
