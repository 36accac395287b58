"""Adapters that every task mixes for itself. Shape suffix: E experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.models.adapters import LoraLayout, private_adapter
from mtl.models.lora_config import lora_config
from mtl.models.routes import Gate, Target, Targets


class ExpertsLayout(LoraLayout):
    """E shared LoRA experts, which each task mixes by weights of its own in every layer.

    ``y = W0 x + sum_e pi_te s B_e A_e x`` with ``pi_t = softmax(z_t)``. The logits ``z_t`` begin at 0 and are private:
    the optimizer trains them like an adapter, and no surgery acts on them. As the weights do not depend on the input,
    a task is exported as one plain LoRA of rank ``E r``. There is no DoRA of experts: several norms have no single one
    that is their mixture.

    Source: the gates of Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
    Mixture-of-Experts", KDD 2018, Eq. 6 and 7, on LoRA and with constant gates.

    Args:
        model: The base model; its linear layers are wrapped in place.
        num_tasks: T.
        num_experts: E.
        lora_r: Rank of an expert.
        lora_alpha: Scale of an expert, ``lora_alpha / lora_r``; twice the rank if not given.
        lora_dropout: Dropout on the input of every expert.
        target_modules: As in :class:`LoraLayout`, and so are the next two.
        init_lora_weights: How A and B begin.
        use_rslora: Scale by ``lora_alpha / sqrt(r)``.
        seed: Seeds the initial values.

    Raises:
        UserError: There is no expert, the rank is not positive, or a layer is not linear.
    """

    needs_routing = True  # a pass of peft's own layers has no gradient for the gates

    def __init__(
        self,
        model: nn.Module,
        num_tasks: int,
        *,
        num_experts: int = 4,
        lora_r: int = 8,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.05,
        target_modules: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        seed: int = 0,
    ) -> None:
        if min(num_experts, lora_r) < 1:
            raise UserError(
                f"adapters.num_experts={num_experts}, adapters.lora_r={lora_r}: both must be positive. Correct them."
            )
        self._experts = [f"expert{expert}" for expert in range(num_experts)]
        config = {
            expert: lora_config(
                model,
                lora_r,
                lora_alpha,
                lora_dropout=lora_dropout,
                target_modules=target_modules,
                init_lora_weights=init_lora_weights,
                use_rslora=use_rslora,
            )
            for expert in self._experts
        }
        self._set_up(model, config, [self._experts] * num_tasks, seed)

    def _finish_layers(self) -> None:
        if not self.can_route:
            raise UserError(
                "adapters: experts need layers that are linear in the base model, and one of target_modules is not. "
                "Name others in adapters.target_modules, or take another layout."
            )
        self._scalings = [[layer.scaling[expert] for expert in self._experts] for layer in self._layers]
        for layer in self._layers:
            device = layer.lora_A[self._experts[0]].weight.device
            layer.gates = nn.ParameterDict(
                {
                    private_adapter(task): nn.Parameter(torch.zeros(len(self._experts), device=device))
                    for task in range(self.num_tasks)
                }
            ).to(layer.lora_A[self._experts[0]].weight.dtype)

    def _targets(self, task: int, shared_N: Tensor, private_N: Tensor) -> Targets:
        experts = [Target(expert, shared_N, shared_N) for expert in self._experts]
        return Targets(experts, Gate(private_adapter(task), private_N))

    def _set_active(self, task: int | None) -> None:
        super()._set_active(task)
        for layer, scalings in zip(self._layers, self._scalings, strict=True):
            weights = [1.0] * len(scalings) if task is None else self._weights(layer, task).tolist()
            for expert, scaling, weight in zip(self._experts, scalings, weights, strict=True):
                layer.scaling[expert] = scaling * weight

    def _finish_joined(self, task: int, adapter: str) -> None:
        for layer in self._layers:
            joined = layer.lora_A[adapter].weight.data
            parts = joined.split(len(joined) // len(self._experts))
            for part, weight in zip(parts, self._weights(layer, task), strict=True):
                part.mul_(weight)

    @staticmethod
    def _weights(layer: nn.Module, task: int) -> Tensor:
        """``pi_t`` [E] in a layer."""
        gates: nn.ParameterDict = layer.gates  # type: ignore[assignment]
        weights_E: Tensor = gates[private_adapter(task)].detach().softmax(dim=0)
        return weights_E
