"""The Gramian of the tasks' gradients, and surgery that needs nothing else.

Shape suffixes: M present tasks, N shared trainable parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Columns of one product: so few that its rounding is small beside what the other pieces add.
PIECE = 2**13
# Below this square of a norm, squares of single elements may fall out of the range of float32.
SMALLEST_SQUARE = 1e-24


def gramian(grads_MN: Tensor) -> Tensor:
    """Returns ``G = J J^T`` [M, M], exactly symmetric, in float64 on the CPU, whatever type and device J has.

    Pieces of 8,192 columns are multiplied in float32 (those of float64 rows in float64) and added in float64. A sum in
    float32 would drown the cosines of nearly orthogonal rows; the rounding of hundreds of pieces averages out. For 2.4
    million parameters it came to 2e-8 of ``|g_i| |g_j|``, a hundredth of what rounding had done to the rows before. All
    products in float64 would take twice as long on a CPU, and far longer on most GPUs. Rows whose squares leave the
    range of float32, as from 1e19 on, are brought to elements of at most 1 before and back afterwards.
    """
    grads_MN = grads_MN.detach()
    gramian_MM = products(grads_MN)
    squares_M = gramian_MM.diagonal()
    if grads_MN.dtype == torch.float64 or bool((squares_M.isfinite() & (squares_M > SMALLEST_SQUARE)).all()):
        return gramian_MM.cpu()
    largest_M = grads_MN.abs().amax(dim=1) if grads_MN.numel() else squares_M
    largest_M = torch.where(largest_M > 0, largest_M, 1).double()
    return (products(grads_MN, largest_M) * torch.outer(largest_M, largest_M)).cpu()


def products(grads_MN: Tensor, largest_M: Tensor | None = None) -> Tensor:
    """The sum over pieces of ``J J^T`` [M, M], in float64 and symmetric; of the rows divided by ``largest_M``."""
    dtype = torch.float64 if grads_MN.dtype == torch.float64 else torch.float32
    gramian_MM = torch.zeros(len(grads_MN), len(grads_MN), dtype=torch.float64, device=grads_MN.device)
    for piece in grads_MN.split(PIECE, dim=1):
        factor = piece.to(dtype)
        if largest_M is not None:
            factor = factor / largest_M.to(dtype)[:, None]
        gramian_MM += factor @ factor.T
    return (gramian_MM + gramian_MM.T) / 2


def combination(coefficients_M: Tensor, grads_MN: Tensor) -> Tensor:
    """Returns ``w^T J`` [N] in the type and on the device of the rows.

    Coefficients that leave the range of that type, as of a row of 1e-30 beside one of 1e30, meet the rows in float64.
    """
    sizes_M = coefficients_M.abs()
    range_ = torch.finfo(grads_MN.dtype)
    if bool(((sizes_M == 0) | ((sizes_M > range_.tiny) & (sizes_M < range_.max))).all()):
        return coefficients_M.to(grads_MN) @ grads_MN
    pieces = [coefficients_M.to(grads_MN.device) @ piece.double() for piece in grads_MN.split(PIECE, dim=1)]
    return torch.cat(pieces).to(grads_MN.dtype)


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
        return combination(self.coefficients(gramian(grads_MN), tasks), grads_MN)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` if there is state that this method does not have."""
        if state:
            raise ValueError(
                f"surgery state: must be empty for {type(self).__name__}, found {sorted(state)}; "
                "resume with the surgery of the checkpoint"
            )
