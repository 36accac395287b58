"""Adapters with one A for all tasks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mtl.errors import UserError
from mtl.models.adapters import LoraLayout, private_adapter
from mtl.models.lora_config import lora_config
from mtl.models.routes import Target, Targets


class SharedALayout(LoraLayout):
    """A LoRA for each task whose A all tasks train together: ``y = W0 x + s B_t A x``.

    What is read from the input is common, what is made of it is each task's own: ``r (I + T O)`` parameters a layer
    instead of ``T r (I + O)``.

    Source: Tian et al., "HydraLoRA", NeurIPS 2024, with the known task in the place of the router.

    Args:
        model: The base model; its linear layers are wrapped in place.
        num_tasks: T.
        lora_r: Rank.
        lora_alpha: Scale, ``lora_alpha / lora_r``; twice the rank if not given.
        lora_dropout: Dropout on the input of every adapter.
        target_modules: As in :class:`LoraLayout`, and so are the next two.
        init_lora_weights: How A and B begin.
        use_rslora: Scale by ``lora_alpha / sqrt(r)``.
        seed: Seeds the initial values.

    Raises:
        UserError: The rank is not positive, or a layer is not linear.
    """

    def __init__(
        self,
        model: nn.Module,
        num_tasks: int,
        *,
        lora_r: int = 16,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.05,
        target_modules: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        seed: int = 0,
    ) -> None:
        if lora_r < 1:
            raise UserError(f"adapters.lora_r={lora_r}: must be positive. Correct the rank.")
        config = {
            private_adapter(task): lora_config(
                model,
                lora_r,
                lora_alpha,
                lora_dropout=lora_dropout,
                target_modules=target_modules,
                init_lora_weights=init_lora_weights,
                use_rslora=use_rslora,
            )
            for task in range(num_tasks)
        }
        self._set_up(model, config, [[adapter] for adapter in config], seed)

    def _finish_layers(self) -> None:
        for layer in self._layers:
            if not layer.lora_A:
                raise UserError(
                    f"adapters.target_modules: {type(layer).__name__} can't share its A. Name linear layers only."
                )
            first = private_adapter(0)
            for task in range(1, self.num_tasks):
                layer.lora_A[private_adapter(task)] = layer.lora_A[first]
                # All begin alike: an orthogonal B has a product of 0 with the A that it was drawn with.
                layer.lora_B[private_adapter(task)].load_state_dict(layer.lora_B[first].state_dict())

    def _owner(self, kind: str, name: str) -> int | None:
        return None if kind == "lora_A" else super()._owner(kind, name)

    def _targets(self, task: int, shared_N: Tensor, private_N: Tensor) -> Targets:
        return Targets([Target(private_adapter(task), shared_N, private_N)])
