"""The Gramian of the tasks' gradients, and surgery that needs nothing else.

Shape suffixes: M present tasks, N shared trainable parameters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Columns of one product. One product of few long rows has too small a result for several threads or multiprocessors to
# share; a batch of short ones keeps them all busy.
PIECE = 1024
# Elements of the float64 copy, made once and used again: 16 MiB stay in cache, and fresh memory costs page faults, more
# than the products of 8 rows. Leaving out what lies below the diagonal would save under 10 %, even of 64 rows.
BUFFER_ELEMENTS = 2**21


def gramian(grads_MN: Tensor) -> Tensor:
    """Returns ``G = J J^T`` [M, M], exactly symmetric, in float64 on the CPU, whatever type and device J has.

    Products are formed and added in float64: cosines of nearly orthogonal rows would drown in float32 rounding. The
    rows are converted piece by piece, so that no float64 copy of all of J exists.
    """
    num_rows, num_parameters = grads_MN.shape
    num_pieces = max(1, min(BUFFER_ELEMENTS // max(1, num_rows * PIECE), math.ceil(num_parameters / PIECE)))
    buffer = torch.empty(num_rows, num_pieces * PIECE, dtype=torch.float64, device=grads_MN.device)
    pieces = buffer.view(num_rows, num_pieces, PIECE).transpose(0, 1)
    gramians = torch.zeros(num_pieces, num_rows, num_rows, dtype=torch.float64, device=grads_MN.device)
    for columns in grads_MN.detach().split(buffer.shape[1], dim=1):
        buffer[:, : columns.shape[1]] = columns
        buffer[:, columns.shape[1] :] = 0
        gramians.baddbmm_(pieces, pieces.mT)
    gramian_MM = gramians.sum(dim=0)
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
