"""LoRA layouts: which adapters exist, and which of them a task trains.

A layout puts adapters on every linear layer of the frozen base model, and a task's forward is

    y = W0 x + sum_k s_k B_k A_k x,   over the adapters k of the task.

``LoraLayout`` has one *shared* adapter that all tasks train and one *private* adapter per task; its two ranks cover the
three useful cases. The layouts built on it share other things.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mtl.errors import UserError
from mtl.interfaces import Segment
from mtl.models.lora_config import lora_config
from mtl.models.routes import Route, Target, Targets, make_blocks

if TYPE_CHECKING:
    from peft import LoraConfig


SHARED = "shared"


def private_adapter(task: int) -> str:
    """peft's name for a task's own adapter: by index, since peft forbids dots and task names are free text."""
    return f"task{task}"


def or_shared(own: Sequence[Any], shared: Sequence[Any]) -> Sequence[Any]:
    """An adapter's own options, each as the shared adapter's where it is not given."""
    return [default if value is None else value for value, default in zip(own, shared, strict=True)]


class LoraLayout:
    """Shared and private LoRA adapters on a frozen base model.

    Args:
        model: The base model; its linear layers are wrapped in place.
        num_tasks: T.
        lora_r: Rank of the adapter that every task trains; 0 for none.
        private_lora_r: Rank of each task's own adapter; 0 for none.
        lora_alpha: Scale of the shared adapter, ``lora_alpha / lora_r``; twice the rank if not given.
        private_lora_alpha: The same for the private adapters.
        lora_dropout: Dropout on the input of every adapter. One mask serves all adapters of a task.
        private_lora_dropout: The same for the private adapters; as the shared one if not given. Another rate has a mask
            of its own, and such layers cannot mix tasks in one forward.
        target_modules: Suffixes of the names of the layers that get adapters; every linear layer but the output
            embedding if not given.
        private_target_modules: The same for the private adapters; as the shared one if not given.
        init_lora_weights: ``True`` (A Kaiming uniform, B 0), ``"gaussian"`` (A normal, B 0) or ``"orthogonal"`` (both
            random, of even rank, with a product of 0).
        private_init_lora_weights: The same for the private adapters; as the shared one if not given.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (Kalajdzievski, arXiv 2312.03732, 2023).
        use_dora: Also train the norms of the weights (Liu et al., ICML 2024); with one adapter a task only, since the
            norms of two have no single adapter that is their sum. Such layers cannot mix tasks in one forward.
        seed: Seeds the adapters' initial values.

    Raises:
        UserError: Both ranks are 0, no layer has one of the names, or two options exclude each other.
    """

    default_learning_rate = 2e-4
    needs_routing = False

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
        private_lora_dropout: float | None = None,
        target_modules: Sequence[str] | None = None,
        private_target_modules: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        private_init_lora_weights: bool | str | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        seed: int = 0,
    ) -> None:
        if min(lora_r, private_lora_r) < 0 or lora_r + private_lora_r == 0:
            raise UserError(
                f"adapters.lora_r={lora_r}, adapters.private_lora_r={private_lora_r}: at least one rank must be "
                "positive and none negative, or nothing is trained. Set one, or take adapters=full."
            )
        if use_dora and min(lora_r, private_lora_r) > 0:
            raise UserError(
                f"adapters.use_dora=true with lora_r={lora_r} and private_lora_r={private_lora_r}: two DoRA adapters "
                "can't be exported as one. Set one of the ranks to 0."
            )
        shared = (lora_dropout, target_modules, init_lora_weights)
        own = or_shared((private_lora_dropout, private_target_modules, private_init_lora_weights), shared)
        configs = {
            adapter: lora_config(
                model,
                rank,
                alpha,
                lora_dropout=dropout,
                target_modules=modules,
                init_lora_weights=init,
                use_rslora=use_rslora,
                use_dora=use_dora,
            )
            for adapter, rank, alpha, (dropout, modules, init) in [
                (SHARED, lora_r, lora_alpha, shared),
                *((private_adapter(t), private_lora_r, private_lora_alpha, own) for t in range(num_tasks)),
            ]
            if rank > 0
        }
        members = [[name for name in (SHARED, private_adapter(t)) if name in configs] for t in range(num_tasks)]
        self._set_up(model, configs, members, seed)

    def _set_up(
        self, model: nn.Module, configs: Mapping[str, LoraConfig], members: Sequence[Sequence[str]], seed: int
    ) -> None:
        """Puts the adapters on the model.

        Args:
            model: The base model.
            configs: One for each adapter.
            members: The adapters of each task.
            seed: Of their initial values.
        """
        from peft.tuners.lora.layer import Linear

        from mtl.models.lora import route_layers, tuner_layers, with_adapters

        self.peft_model = with_adapters(model, configs, seed)
        self.model = model
        self.num_tasks = len(members)
        self._members = members
        self._layers = tuner_layers(model)
        self._joined: dict[int, str] = {}
        self._route = Route()
        one_mask = len({config.lora_dropout for config in configs.values()}) == 1
        self.can_route = one_mask and all(type(layer) is Linear and not layer.lora_variant for layer in self._layers)
        self._finish_layers()
        # By who trains them: all or several tasks (None), or one.
        self._parameters: dict[int | None, list[nn.Parameter]] = {None: [], **{t: [] for t in range(self.num_tasks)}}
        for name, parameter in model.named_parameters():
            if found := re.search(r"\.(lora_[^.]+|gates)\.([^.]+)", name):
                self._parameters[self._owner(found[1], found[2])].append(parameter)
        if self.can_route:
            route_layers(self._layers, self._route, list(self._parameters.values()))
        for parameter in self.parameters():
            parameter.requires_grad_(True)  # add_adapter leaves all but the first one frozen
        model.train(model.training)  # new modules begin in training mode: dropout would act in an evaluation
        self._set_active(None)

    def _finish_layers(self) -> None:
        """What a layout does to the layers once they have their adapters."""

    def _owner(self, kind: str, name: str) -> int | None:
        """The only task that trains a parameter of a layer: of an adapter's ``lora_A``, say, or of ``gates``."""
        return int(name.removeprefix("task")) if re.fullmatch(r"task\d+", name) else None

    @contextmanager
    def activate(self, task: int | None) -> Iterator[None]:
        """Lets ``task``'s adapters act (``None``: no adapter, the base model) until the block ends.

        Run the backward inside the block too: gradient checkpointing recomputes with whatever is active by then.
        """
        before = self._active
        self._set_active(task)
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
        rows_N = list(shared_RN)
        tasks = {segment.task for segment in segments}
        targets = {task: self._targets(task, rows_N[rows[task]], private[task]) for task in tasks}
        self._route.blocks = make_blocks(segments, targets)
        try:
            yield
        finally:
            self._route.blocks = None

    def _targets(self, task: int, shared_N: Tensor, private_N: Tensor) -> Targets:
        """A task's adapters, with its row for the gradients of shared parameters and its flat one for its own."""
        own = private_adapter(task)
        gradients = {adapter: private_N if adapter == own else shared_N for adapter in self._members[task]}
        return Targets([Target(adapter, gradient, gradient) for adapter, gradient in gradients.items()])

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that several tasks train."""
        return self._parameters[None]

    def private_parameters(self, task: int) -> list[nn.Parameter]:
        """Parameters that only ``task`` trains."""
        return self._parameters[task]

    def idle_parameters(self, tasks: Sequence[int]) -> list[nn.Parameter]:
        """Shared parameters that none of these tasks trains."""
        return []

    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, in a fixed order."""
        return [parameter for members in self._parameters.values() for parameter in members]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All trainable parameters by their names in the model."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Lets one adapter a task act until the block ends, as it is exported: all of a task's adapters in one.

        Their sum is that adapter's product, exactly (peft's ``cat``, of the sum of their ranks); only rounding differs,
        which over all layers can come to 1e-4 in a float32 logit. Nothing can be trained meanwhile.
        """
        self._set_active(None)
        several = {task: list(members) for task, members in enumerate(self._members) if len(members) > 1}
        for task, members in several.items():
            name = f"joined{task}"
            self._tuner.add_weighted_adapter(members, [1.0] * len(members), name, combination_type="cat")
            # The scales are in the new A already, and peft would put rsLoRA's on top.
            config: Any = self.peft_model.peft_config[name]
            config.use_rslora = False
            for layer in self._layers:
                layer.scaling[name] = 1.0
            self._finish_joined(task, name)
            self._joined[task] = name
        self.model.train(self.model.training)  # as in the constructor
        self._set_active(None)
        try:
            yield
        finally:
            for task in several:
                self._tuner.delete_adapter(self._joined.pop(task))
            for parameter in self.parameters():
                parameter.requires_grad_(True)  # delete_adapter froze them
            self._set_active(None)

    def _finish_joined(self, task: int, adapter: str) -> None:
        """What a layout does to a task's joined adapter."""

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
            if SHARED in self.peft_model.peft_config:
                self._save(SHARED, folder / SHARED)

    def _adapters_of(self, task: int) -> Sequence[str]:
        return [self._joined[task]] if task in self._joined else self._members[task]

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

    def _set_active(self, task: int | None) -> None:
        # peft's set_adapter would freeze every other adapter (and their Adam would then skip a step).
        adapters = [] if task is None else list(self._adapters_of(task))
        for layer in self._layers:
            layer._active_adapter = adapters
        self._active = task
