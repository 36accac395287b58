"""Layouts: which trainable parameters exist, and which of them a task trains.

A LoRA layout puts up to two kinds of adapters on every linear layer of the frozen base model:

    y = W0 x + s_shared B A x + s_t B_t A_t x

one *shared* adapter that all tasks train and one *private* adapter per task. ``LoraLayout`` covers the three useful
cases by its two ranks; ``FullLayout`` trains the whole model instead.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl.distributed import whole
from mtl.errors import UserError
from mtl.interfaces import Segment

SHARED = "shared"


def private_adapter(task: int) -> str:
    """peft's name for a task's own adapter: by index, since peft forbids dots and task names are free text."""
    return f"task{task}"


class LoraLayout:
    """Shared and private LoRA adapters on a frozen base model.

    Args:
        model: The base model; its linear layers are wrapped in place.
        num_tasks: T.
        lora_r: Rank of the adapter that every task trains; 0 for none.
        private_lora_r: Rank of each task's own adapter; 0 for none.
        lora_alpha: Scale of the shared adapter, ``lora_alpha / lora_r``; twice the rank if not given.
        private_lora_alpha: The same for the private adapters.
        lora_dropout: Dropout on the input of every adapter.
        target_modules: Suffixes of the names of the layers that get adapters; every linear layer but the output
            embedding if not given.
        seed: Seeds the adapters' initial values.

    Raises:
        UserError: Both ranks are 0, or no layer has one of the names.
    """

    default_learning_rate = 2e-4

    def __init__(
        self,
        model: nn.Module,
        num_tasks: int,
        *,
        lora_r: int = 16,
        private_lora_r: int = 0,
        lora_alpha: float | None = None,
        private_lora_alpha: float | None = None,
        lora_dropout: float = 0.05,
        target_modules: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if min(lora_r, private_lora_r) < 0 or lora_r + private_lora_r == 0:
            raise UserError(
                f"adapters.lora_r={lora_r}, adapters.private_lora_r={private_lora_r}: at least one rank must be "
                "positive and none negative, or nothing is trained. Set one, or take adapters=full."
            )
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        from mtl.models.lora import Route, route_layer, tuner_layers, with_adapters

        names = sorted(target_modules) if target_modules is not None else linear_layer_names(model)
        configs = {
            adapter: LoraConfig(
                r=rank,
                lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]
                lora_dropout=lora_dropout,
                target_modules=names,
                task_type="CAUSAL_LM",
            )
            for adapter, rank, alpha in [
                (SHARED, lora_r, lora_alpha),
                *((private_adapter(t), private_lora_r, private_lora_alpha) for t in range(num_tasks)),
            ]
            if rank > 0
        }
        self.peft_model = with_adapters(model, configs, seed)
        self.model = model
        self.num_tasks = num_tasks
        self._adapters = list(configs)
        self._layers = tuner_layers(model)
        self._joined: dict[int, str] = {}
        self._parameters: dict[str, list[nn.Parameter]] = {adapter: [] for adapter in configs}
        for name, parameter in model.named_parameters():
            if found := re.search(r"\.lora_[^.]+\.([^.]+)", name):
                self._parameters[found[1]].append(parameter)
        self._route = Route()
        self.can_route = all(type(layer) is Linear and not layer.lora_variant for layer in self._layers)
        if self.can_route:
            for layer in self._layers:
                route_layer(layer, self._route, self._parameters)
        for parameter in self.parameters():
            parameter.requires_grad_(True)  # add_adapter leaves all but the first one frozen
        model.train(model.training)  # new modules begin in training mode: dropout would act in an evaluation
        self._set_active([])

    @contextmanager
    def activate(self, task: int | None) -> Iterator[None]:
        """Lets ``task``'s adapters act (``None``: no adapter, the base model) until the block ends.

        Run the backward inside the block too: gradient checkpointing recomputes with whatever is active by then.
        """
        before = self._active
        self._set_active([] if task is None else self._adapters_of(task))
        try:
            yield
        finally:
            self._set_active(before)

    @contextmanager
    def route(
        self, segments: Sequence[Segment], shared_RN: Tensor, rows: Mapping[int, int], private: Mapping[int, Tensor]
    ) -> Iterator[None]:
        """Sends every position of a micro-batch through the adapters of its task until the block ends.

        The backward, which belongs into the block too, adds the gradients to the buffers given instead of ``.grad``.

        Args:
            segments: Which positions are whose; all of them.
            shared_RN: Takes the gradients of the shared parameters.
            rows: The row of each task.
            private: Takes the flat gradient of each task's private parameters.
        """
        from mtl.models.lora import Target, make_blocks

        rows_N = list(shared_RN)
        targets = {
            task: [
                Target(adapter, rows_N[rows[task]] if adapter == SHARED else private[task])
                for adapter in self._adapters_of(task)
            ]
            for task in {segment.task for segment in segments}
        }
        self._route.blocks = make_blocks(segments, targets)
        try:
            yield
        finally:
            self._route.blocks = None

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that every task trains."""
        return self._parameters.get(SHARED, [])

    def private_parameters(self, task: int) -> list[nn.Parameter]:
        """Parameters that only ``task`` trains."""
        return self._parameters.get(private_adapter(task), [])

    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, in a fixed order."""
        return [parameter for adapter in self._adapters for parameter in self._parameters[adapter]]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All trainable parameters by their names in the model."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Lets one adapter a task act until the block ends, as it is exported: shared and private in one.

        The sum of both is that adapter's product, exactly (peft's ``cat``, rank r_shared + r_private); only rounding
        differs, which over all layers can come to 1e-4 in a float32 logit. Nothing can be trained meanwhile.
        """
        parts = {task: self._adapters_of(task) for task in range(self.num_tasks)}
        pairs = {task: pair for task, pair in parts.items() if len(pair) == 2}
        for task, pair in pairs.items():
            self._tuner.add_weighted_adapter(pair, [1.0, 1.0], f"joined{task}", combination_type="cat")
            self._joined[task] = f"joined{task}"
        self.model.train(self.model.training)  # as in the constructor
        self._set_active([])
        try:
            yield
        finally:
            for task in pairs:
                self._tuner.delete_adapter(self._joined.pop(task))
            for parameter in self.parameters():
                parameter.requires_grad_(True)  # delete_adapter froze them
            self._set_active([])

    def export(self, folder: Path, task_names: Sequence[str], *, write: bool = True) -> None:
        """Writes ``folder/<task>`` for every task, and ``folder/shared``, as standard PEFT folders.

        Every rank calls it, and one of them with ``write``.
        """
        if not write:
            return
        with self.joined():
            for task, name in enumerate(task_names):
                [adapter] = self._adapters_of(task)
                self._save(adapter, folder / name)
            if SHARED in self._parameters:
                self._save(SHARED, folder / SHARED)

    def _adapters_of(self, task: int) -> list[str]:
        if task in self._joined:
            return [self._joined[task]]
        return [adapter for adapter in (SHARED, private_adapter(task)) if adapter in self._parameters]

    def _save(self, adapter: str, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = folder.parent / ".staging"  # peft writes into a subfolder named after the adapter
        self.peft_model.save_pretrained(str(staging), selected_adapters=[adapter])
        config_file = staging / adapter / "adapter_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])  # peft holds a set: its order differs between runs
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        (staging / adapter).rename(folder)
        shutil.rmtree(staging)

    @property
    def _tuner(self) -> Any:  # noqa: ANN401 - peft types it as a plain module
        return self.peft_model.base_model

    def _set_active(self, adapters: list[str]) -> None:
        # peft's set_adapter would freeze every other adapter (and their Adam would then skip a step).
        for layer in self._layers:
            layer._active_adapter = adapters
        self._active = adapters


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


def linear_layer_names(model: nn.Module) -> list[str]:
    """The distinct last names of all linear layers but the output embedding, sorted.

    Explicit names keep ``adapter_config.json`` small and stable; peft's ``all-linear`` expands to an unordered list
    of every module.
    """
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()  # type: ignore[operator]
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    }
    if not found:
        raise UserError(
            "adapters.target_modules: the model has no linear layer. Name its layers, or take adapters=full."
        )
    return sorted(found)
