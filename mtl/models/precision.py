"""Float64 that is float64 all the way, for exact comparisons."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class KeepFloat64(TorchFunctionMode):
    """Leaves float64 tensors as they are where a model's code asks for float32.

    transformers computes norms and some softmaxes in float32 whatever the model's dtype. In a float64 model that rounds
    every activation to 7 digits, and which way depends on the shape of the batch: the gradients of one step cut in two
    ways then differ by 1e-8 instead of 1e-15.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [torch.float64 if value is torch.float32 else value for value in args]
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def keep_float64(model: nn.Module) -> None:
    """Makes ``model`` run every forward under :class:`KeepFloat64`."""
    forward = model.forward

    @functools.wraps(forward)
    def forward_in_float64(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with KeepFloat64():
            return forward(*args, **kwargs)

    model.forward = forward_in_float64
