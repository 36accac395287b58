"""Every collective of the library.

Data parallelism here needs no wrapper around the model: each rank runs its slice of the step, and the tasks' gradients
are summed once, while they are still apart. On one process every method is a no-op.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor


class Distributed:
    """The ranks of a run, and what they tell each other.

    Args:
        accelerator: The run's accelerator; it owns the process group.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces ``tensor`` by its sum over ranks; every rank gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors by those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def broadcast_object(self, value: Any) -> Any:  # noqa: ANN401
        """The value of rank 0, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Every rank's value on every rank, in rank order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.accelerator.wait_for_everyone()

    def check_identical(self, tensors: Iterable[Tensor], what: str) -> None:
        """Stops the run if the ranks' tensors differ in a single bit.

        Raises:
            RuntimeError: Names the ranks that differ from rank 0.
        """
        digests = self.gather(checksum(tensors))
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise RuntimeError(f"{what} differ between rank 0 and ranks {odd}: the ranks have drifted apart.")


def checksum(tensors: Iterable[Tensor]) -> str:
    """sha256 over the bytes of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
