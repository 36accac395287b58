"""The layout without adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.distributed import whole


class FullLayout:
    """Trains every parameter of the model; all of them are shared.

    Args:
        model: The model.
        num_tasks: T.
    """

    default_learning_rate = 1e-5

    def __init__(self, model: nn.Module, num_tasks: int) -> None:
        self.model = model
        self.num_tasks = num_tasks
        if next(model.parameters()).dtype in (torch.float16, torch.bfloat16):
            model.float()  # at usual learning rates a half-precision weight would round almost every update away
        model.requires_grad_(True)

    @contextmanager
    def activate(self, task: int | None) -> Iterator[None]:
        """Does nothing: there is one model for all tasks."""
        yield

    def shared_parameters(self) -> list[nn.Parameter]:
        """Every parameter."""
        return list(self.model.parameters())

    def private_parameters(self, task: int) -> list[nn.Parameter]:
        """None."""
        return []

    def idle_parameters(self, tasks: Sequence[int]) -> list[nn.Parameter]:
        """None."""
        return []

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter, in a fixed order."""
        return self.shared_parameters()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by its name; tied ones once."""
        return dict(self.model.named_parameters())

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Does nothing: there are no adapters to join."""
        yield

    def export(self, folder: Path, task_names: Sequence[str], *, write: bool = True) -> None:
        """Writes the model to ``folder.parent/model``: there are no adapters.

        Every rank calls it, and one of them with ``write``: of a sharded model each has a part to give.
        """
        weights: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in weights:  # tied ones are one tensor, and saved once
                full = whole(tensor.detach())
                weights[id(tensor)] = full.cpu() if write else torch.empty(0)
            state[name] = weights[id(tensor)]
        if write:
            model: Any = self.model
            model.save_pretrained(str(folder.parent / "model"), state_dict=state)
