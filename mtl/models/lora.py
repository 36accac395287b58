"""LoRA layers in a forward that holds several tasks, each through its own adapters.

When it trains, peft runs one set of adapters at a time. Here every position x of a micro-batch has its own:

    y = W0 x + sum_k s_k B_k A_k d(x),   over the adapters k of the position's task,

with one dropout d for all of them, as in the single adapter that they are joined to for export. The adapters of a
position act as one of the sum of their ranks, since thin matrix products take as long as those of twice the rank. The
backward adds the gradients of A_k and B_k straight to where the caller wants them: those of a shared adapter to a row
for each task. Since a position belongs to one task, all rows together cost the FLOPs of the gradient of their sum.

Shape suffixes: P positions (the rows of a micro-batch one after the other), I inputs and O outputs of a layer, r rank,
N parameters of an adapter.
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
from mtl.models.routes import Block, Route, Span


class RoutedLinear(Linear):
    """peft's LoRA of a linear layer, with another forward while its route has blocks."""

    route: Route
    starts: Mapping[int, int]  # of a parameter, by id: where its gradient begins in the flat one that it is a part of
    gates: nn.ParameterDict  # by the gate's name, one logit for each adapter that it mixes

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """The layer's output."""
        blocks = self.route.blocks
        if blocks is None:
            return super().forward(x, *args, **kwargs)
        y: Tensor = self.base_layer(x)
        # In the adapters' dtype, or that of autocast, as peft's own layer computes.
        autocast = torch.is_autocast_enabled(y.device.type)
        dtype = torch.get_autocast_dtype(y.device.type) if autocast else None
        factors = [Factors.of(self, block, dtype) for block in blocks if self._has_some(block)]
        if not factors:
            return y
        dropout: nn.Module = self.lora_dropout[factors[0].adapters[0]]  # the same of all
        rate = round_rate(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        output: Tensor = _AddProducts.apply(self.route.anchor, y, x, factors, rate)  # type: ignore[no-untyped-call]
        return output

    def _has_some(self, block: Block) -> bool:
        return any(target.adapter in self.lora_A for target in block.targets.adapters)


def route_layers(layers: Sequence[Any], route: Route, flat: Sequence[Sequence[nn.Parameter]]) -> None:
    """Makes layers of peft :class:`RoutedLinear`; each list of ``flat`` has its gradients in one flat tensor."""
    starts: dict[int, int] = {}
    for parameters in flat:
        start = 0
        for parameter in parameters:
            starts[id(parameter)] = start
            start += parameter.numel()
    for layer in layers:
        layer.__class__ = RoutedLinear
        layer.route, layer.starts = route, starts


Product = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Factors:
    """A block's adapters in one layer, as a single one of the sum of their ranks: ``scaling * b_Or @ a_rI``."""

    block: Block
    adapters: Sequence[str]  # those of the block's that the layer has
    a_rI: Tensor
    b_Or: Tensor
    scaling: float
    ranks: Sequence[int]
    scalings: Sequence[float]
    starts: Sequence[tuple[int, int]]
    weights_E: Tensor | None  # what the gate makes of its logits, one for each adapter
    gate_start: int

    @classmethod
    def of(cls, layer: Any, block: Block, dtype: torch.dtype | None) -> Factors:  # noqa: ANN401
        """Those of a layer of peft, in another dtype than their own if one is given."""
        names, gate = [target.adapter for target in block.targets.adapters], block.targets.gate
        adapters = [adapter for adapter in names if adapter in layer.lora_A]
        weights_a = [layer.lora_A[adapter].weight for adapter in adapters]
        weights_b = [layer.lora_B[adapter].weight for adapter in adapters]
        scalings = [layer.scaling[adapter] for adapter in adapters]
        all_a, all_b = [a.detach() for a in weights_a], [b.detach() for b in weights_b]
        weights_E = None if gate is None else layer.gates[gate.name].detach().softmax(dim=0)
        if weights_E is not None:
            all_b = [b * weight for b, weight in zip(all_b, weights_E, strict=True)]
        if len(adapters) > 1:
            all_b = [b if s == scalings[0] else b * (s / scalings[0]) for b, s in zip(all_b, scalings, strict=True)]
            all_a, all_b = [torch.cat(all_a)], [torch.cat(all_b, dim=1)]
        return cls(
            block,
            adapters,
            all_a[0].to(dtype or all_a[0].dtype),
            all_b[0].to(dtype or all_b[0].dtype),
            scalings[0],
            [len(a) for a in weights_a],
            scalings,
            [(layer.starts[id(a)], layer.starts[id(b)]) for a, b in zip(weights_a, weights_b, strict=True)],
            weights_E,
            0 if gate is None else layer.starts[id(layer.gates[gate.name])],
        )

    def add_gradients(self, span: Span, of_a: Product, of_b: Product, keep_rate: float) -> None:
        """Adds those of a span to its targets, given as products [r, P] @ [P, I] and [O, P] @ [P, r]."""
        parts = []
        num_inputs, num_outputs = self.a_rI.shape[1], self.b_Or.shape[0]
        targets = [target for target in span.targets.adapters if target.adapter in self.adapters]
        for target, rank, (start_a, start_b) in zip(targets, self.ranks, self.starts, strict=True):
            a_N = target.a_gradient_N[start_a : start_a + rank * num_inputs]
            b_N = target.b_gradient_N[start_b : start_b + rank * num_outputs]
            parts.append((a_N.view(rank, num_inputs), b_N.view(num_outputs, rank)))
        if len(parts) == 1 and self.weights_E is None:
            add_product(parts[0][0], of_a)
            add_product(parts[0][1], of_b, self.scaling / keep_rate)
            return
        each_a = torch.mm(*of_a).split(self.ranks)
        each_b = torch.mm(*of_b).split(self.ranks, dim=1)
        if self.weights_E is not None:
            each_b = [b * weight for b, weight in zip(each_b, self.weights_E, strict=True)]
            self._add_gate_gradient(span, of_a[0], of_b[1])
        for (sum_a, sum_b), a, b, scaling in zip(parts, each_a, each_b, self.scalings, strict=True):
            sum_a.add_(a)
            sum_b.add_(b, alpha=scaling / keep_rate)

    def _add_gate_gradient(self, span: Span, hidden_gradient_rP: Tensor, hidden_Pr: Tensor) -> None:
        """Through the softmax: ``dL/dz_e = q_e - pi_e sum q``.

        ``q_e`` are the products of an adapter's hidden values with their gradient, which has its weight ``pi_e`` in it.
        """
        gate = span.targets.gate
        assert gate is not None and self.weights_E is not None
        products_r = (hidden_gradient_rP.T * hidden_Pr).sum(dim=0, dtype=gate.gradient_N.dtype)
        q_E = torch.stack([part.sum() for part in products_r.split(list(self.ranks))])
        gate_N = gate.gradient_N[self.gate_start : self.gate_start + len(q_E)]
        gate_N.add_(q_E - self.weights_E.to(q_E.dtype) * q_E.sum())


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
            positions = factor.block.positions
            hidden_Pr = dropped_PI[positions] @ factor.a_rI.T
            y_PO[positions].addmm_(hidden_Pr, factor.b_Or.T, alpha=factor.scaling / (1 - rate))
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
            positions = factor.block.positions
            gradient_Pr = (gradient_PO[positions] @ factor.b_Or).mul_(factor.scaling / (1 - ctx.rate))
            if gradient_PI is not None:
                gradient_PI[positions].addmm_(gradient_Pr, factor.a_rI)
            for span in factor.block.spans:
                at = slice(span.start, span.stop)
                within = slice(span.start - positions.start, span.stop - positions.start)
                rP, PO = gradient_Pr[within].T, gradient_PO[at]
                factor.add_gradients(span, (rP, dropped_PI[at]), (PO.T, hidden_Pr[within]), 1 - ctx.rate)
        if gradient_PI is not None:
            if mask_PI is not None:
                gradient_PI.mul_(mask_PI)
            shape, dtype = ctx.x_like
            gradient_PI = gradient_PI.to(dtype).view(shape)
        return None, gradient, gradient_PI, None, None


def add_product(total: Tensor, factors: Product, scale: float = 1.0) -> None:
    """``total += scale * left @ right``, where the sum may have more digits than the factors."""
    left, right = factors
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
                alike = (
                    set(config.target_modules or ()) == set(configs[first].target_modules or ()) and not config.use_dora
                )
                if alike and all(type(layer) is Linear for layer in layers):
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
