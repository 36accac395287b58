"""LoRA layers in a forward that holds several tasks, each through its own adapters.

When it trains, peft runs one set of adapters at a time. Here every position x of a micro-batch has its own:

    y = W0 x + sum_k s_k B_k A_k d(x),   over the adapters k of the position's task,

with one dropout d for all of them, as in the single adapter that they are joined to for export. The backward adds the
gradients of A_k and B_k straight to where the caller wants them: those of a shared adapter to a row for each task.
Since a position belongs to one task, all rows together cost the FLOPs of the gradient of their sum.

Shape suffixes: P positions (the rows of a micro-batch one after the other), I inputs and O outputs of a layer, r rank,
R rows of gradients, N parameters of an adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.interfaces import Segment


@dataclass(frozen=True)
class Part:
    """What one adapter does in a forward, and where its gradient goes.

    Args:
        adapter: peft's name.
        gradients_RN: The backward adds to it.
        spans: Positions that the adapter acts on, as (start, stop).
        row_spans: The same positions by their row of ``gradients_RN``, as (row, start, stop).
    """

    adapter: str
    gradients_RN: Tensor
    spans: Sequence[tuple[int, int]]
    row_spans: Sequence[tuple[int, int, int]]

    @classmethod
    def of(cls, adapter: str, gradients_RN: Tensor, segments: Sequence[Segment], rows: Mapping[int, int]) -> Part:
        """The part of an adapter that acts on all of ``segments``; ``rows`` gives each task's row."""
        row_spans = merged([(rows[segment.task], segment.start, segment.stop) for segment in segments])
        spans = merged([(0, segment.start, segment.stop) for segment in segments])
        return cls(adapter, gradients_RN, [(start, stop) for _, start, stop in spans], row_spans)


def merged(row_spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Joins neighbours of one row: fewer and larger matrix products."""
    joined: list[tuple[int, int, int]] = []
    for row, start, stop in row_spans:
        if joined and (joined[-1][0], joined[-1][2]) == (row, start):
            start = joined.pop()[1]
        joined.append((row, start, stop))
    return joined


class Route:
    """The parts of the forwards to come, the same for all layers; ``None``: peft's own forward."""

    def __init__(self) -> None:
        self.parts: Sequence[Part] | None = None
        # What autograd calls the layers' backward for: the parameters themselves stay out of its graph, and so do the
        # hooks on them.
        self.anchor = torch.empty(0, requires_grad=True)


class RoutedLinear(Linear):
    """peft's LoRA of a linear layer, with another forward while its route has parts."""

    route: Route
    offsets: dict[str, tuple[int, int]]  # where in an adapter's N parameters those of A and of B begin

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """The layer's output."""
        parts = self.route.parts
        if parts is None:
            return super().forward(x, *args, **kwargs)
        y: Tensor = self.base_layer(x)
        # In the adapters' dtype, or that of autocast, as peft's own layer computes.
        autocast = torch.is_autocast_enabled(y.device.type)
        dtype = torch.get_autocast_dtype(y.device.type) if autocast else None
        dropout: nn.Module = self.lora_dropout[parts[0].adapter]
        rate = round_rate(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        factors = [Factors.of(self, part, dtype) for part in parts]
        output: Tensor = _AddProducts.apply(self.route.anchor, y, x, factors, rate)  # type: ignore[no-untyped-call]
        return output


def route_layer(layer: Any, route: Route, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:  # noqa: ANN401
    """Makes a layer of peft a :class:`RoutedLinear`; ``parameters`` lists each adapter's in the order of its N."""
    layer.__class__ = RoutedLinear
    layer.route = route
    layer.offsets = {}
    for adapter, members in parameters.items():
        starts = np.cumsum([0, *(member.numel() for member in members)]).tolist()
        start_of = dict(zip(map(id, members), starts, strict=False))
        weights = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        layer.offsets[adapter] = (start_of[id(weights[0])], start_of[id(weights[1])])


@dataclass(frozen=True)
class Factors:
    """The matrices of a part in one layer, A [r, I] and B [O, r]."""

    part: Part
    a_rI: Tensor
    b_Or: Tensor
    scaling: float
    offsets: tuple[int, int]

    @classmethod
    def of(cls, layer: Any, part: Part, dtype: torch.dtype | None) -> Factors:  # noqa: ANN401
        """Those of a part in a layer of peft, in another dtype than their own if one is given."""
        a_rI, b_Or = layer.lora_A[part.adapter].weight.detach(), layer.lora_B[part.adapter].weight.detach()
        return cls(
            part,
            a_rI.to(dtype or a_rI.dtype),
            b_Or.to(dtype or b_Or.dtype),
            layer.scaling[part.adapter],
            layer.offsets[part.adapter],
        )

    def gradients(self, row: int) -> tuple[Tensor, Tensor]:
        """Where a row's gradients of A and B are summed."""
        row_N = self.part.gradients_RN[row]
        start_a, start_b = self.offsets
        return (
            row_N[start_a : start_a + self.a_rI.numel()].view_as(self.a_rI),
            row_N[start_b : start_b + self.b_Or.numel()].view_as(self.b_Or),
        )


class _AddProducts(torch.autograd.Function):
    """``y + sum_k s_k B_k A_k d(x)``, in place of y."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, y: Tensor, x: Tensor, factors: Sequence[Factors], rate: float) -> Tensor:  # noqa: ANN401
        dtype = factors[0].a_rI.dtype
        x_PI = x.reshape(-1, x.shape[-1]).to(dtype)
        mask_PI = dropout_mask(x_PI, rate) if rate > 0 else None
        dropped_PI = x_PI if mask_PI is None else x_PI * mask_PI
        y_PO = y.view(-1, y.shape[-1]).to(dtype)  # a copy only if the dtype is another
        hidden = []
        for factor in factors:
            hidden_Pr = x_PI.new_empty(len(x_PI), len(factor.a_rI))
            for start, stop in factor.part.spans:
                torch.mm(dropped_PI[start:stop], factor.a_rI.T, out=hidden_Pr[start:stop])
                y_PO[start:stop].addmm_(hidden_Pr[start:stop], factor.b_Or.T, alpha=factor.scaling / (1 - rate))
            hidden.append(hidden_Pr)
        ctx.save_for_backward(x_PI, mask_PI, *hidden)
        ctx.factors, ctx.rate, ctx.x_like = factors, rate, (x.shape, x.dtype)
        if y.dtype != dtype:
            return y_PO.to(y.dtype).view_as(y)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x_PI, mask_PI, *hidden = ctx.saved_tensors
        gradient_PO = gradient.reshape(-1, gradient.shape[-1]).to(x_PI.dtype)
        dropped_PI = x_PI if mask_PI is None else x_PI * mask_PI
        gradient_PI = torch.zeros_like(x_PI) if ctx.needs_input_grad[2] else None
        for factor, hidden_Pr in zip(ctx.factors, hidden, strict=True):
            scaling = factor.scaling / (1 - ctx.rate)
            gradient_Pr = torch.empty_like(hidden_Pr)
            for start, stop in factor.part.spans:
                torch.mm(gradient_PO[start:stop], factor.b_Or, out=gradient_Pr[start:stop])
                gradient_Pr[start:stop].mul_(scaling)
                if gradient_PI is not None:
                    gradient_PI[start:stop].addmm_(gradient_Pr[start:stop], factor.a_rI)
            for row, start, stop in factor.part.row_spans:
                sum_a, sum_b = factor.gradients(row)
                add_product(sum_a, gradient_Pr[start:stop].T, dropped_PI[start:stop])
                add_product(sum_b, gradient_PO[start:stop].T, hidden_Pr[start:stop], scale=scaling)
        if gradient_PI is not None:
            if mask_PI is not None:
                gradient_PI.mul_(mask_PI)
            shape, dtype = ctx.x_like
            gradient_PI = gradient_PI.to(dtype).view(shape)
        return None, gradient, gradient_PI, None, None


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """``total += scale * left @ right``, where the sum may have more digits than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)


def round_rate(rate: float) -> float:
    """The nearest rate that 16 random bits can meet exactly."""
    return round(rate * 2**16) / 2**16


def dropout_mask(x: Tensor, rate: float) -> Tensor:
    """A random mask of the shape of ``x``, true with probability ``1 - rate``, from torch's generator.

    On a CPU torch takes 8 ns an element, up to a third of a step. Four 16-bit numbers out of one draw of a generator of
    numpy's, which torch's seeds, take a twentieth of that.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - rate)
    seed = int(torch.randint(2**63 - 1, ()))
    draws = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.uint16)[: x.numel()]
    return torch.from_numpy(draws >= rate * 2**16).view(x.shape)


def with_adapters(model: nn.Module, configs: Mapping[str, LoraConfig], seed: int) -> PeftModel:
    """peft's model around ``model``, with an adapter for each config.

    Raises:
        UserError: No layer has one of the names.
    """
    (first, config), *others = configs.items()
    rng_state = torch.get_rng_state()
    torch.manual_seed(seed)  # peft draws the initial A from torch's global generator
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 by an old name whether gradient checkpointing is on.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # and sets it itself
            peft_model = PeftModel(model, config, adapter_name=first)
            layers = tuner_layers(model)
            for adapter, config in others:
                if all(type(layer) is Linear for layer in layers):
                    add_to_layers(peft_model, layers, adapter, config)
                else:
                    peft_model.add_adapter(adapter, config)
    except ValueError as error:
        raise UserError(f"adapters.target_modules={config.target_modules}: {error}") from error
    finally:
        torch.set_rng_state(rng_state)
    return peft_model


def add_to_layers(peft_model: PeftModel, layers: Sequence[Any], adapter: str, config: LoraConfig) -> None:
    """What ``peft_model.add_adapter`` does to layers that have a LoRA already, bit for bit.

    That goes through the whole model several times for each adapter, a third of a second on one of 30 layers, and ever
    longer the more adapters there are.
    """
    first: Any = next(iter(peft_model.peft_config.values()))
    config.target_modules = first.target_modules
    peft_model.peft_config[adapter] = config
    for layer in layers:
        layer.update_layer(adapter, config.r, lora_alpha=config.lora_alpha, config=config)
        for matrix in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
            matrix.requires_grad_(False)
            if matrix.dtype in (torch.float16, torch.bfloat16):
                matrix.data = matrix.data.float()


def tuner_layers(model: nn.Module) -> list[Any]:
    """The layers that peft has put adapters on."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
