"""``mtl export``: adapters or merged weights of a finished run, as folders that need no ``mtl``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mtl.construct import did_you_mean
from mtl.errors import UserError
from mtl.handover.card import Card, card_text
from mtl.handover.combining import Combination, OnLayer, merge_combined, write_combined
from mtl.handover.deployment import FORMATS, Deployment, write_export_file
from mtl.handover.folders import check_place, published
from mtl.handover.gguf_checks import check_for_gguf, copy_sentencepiece
from mtl.handover.merging import DTYPES, checkpoint_dtype, load_untied, merged_model, write_model
from mtl.handover.tokenizer import generation_config, write_tokenizer
from mtl.models.load import PACKAGE_PREFIX, load_model, load_tokenizer
from mtl.reporting.results import read_results
from mtl.tasks import Task

MAX_DIFFERENCE = 1e-3  # of the logits' norm; rounding in float32 comes to 1e-6
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        kind: A member of ``FORMATS``.
        tasks: Their names.
        output: Where to; within the run if not given.
        dtype: Of merged weights; ``auto`` for that of the base model's files.
        combination: How the tasks' adapters become one; each has its own export if not given.
        name: Of the combined one.
    """

    kind: str
    tasks: Sequence[str]
    output: Path | None = None
    dtype: str = "auto"
    combination: Combination | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for option, value, choices in (("--format", self.kind, FORMATS), ("--dtype", self.dtype, DTYPES)):
            if value not in choices:
                raise UserError(f"{option} {value}: must be one of {', '.join(choices)}.{did_you_mean(value, choices)}")
        if self.dtype != "auto" and self.kind == "adapter":
            raise UserError(f"--dtype {self.dtype}: is for merged weights. Add --format merged or gguf-ready.")
        if self.combination is None:
            return
        if len(self.tasks) < 2:
            raise UserError("--combine: needs at least two tasks. Name them: --tasks a,b.")
        if len(self.combination.weights) != len(self.tasks):
            raise UserError(
                f"--weights: must be one a task, found {len(self.combination.weights)} for {len(self.tasks)} tasks."
            )
        if self.name is None:
            raise UserError("--combine: needs a name for what comes out. Add --name NAME.")
        Task(self.name, "none")  # names a folder, as a task does


@dataclass
class _Item:
    """One folder to write: whose adapter, for which tasks."""

    name: str
    tasks: Sequence[str]
    adapter: Path | None
    folder: Path
    notes: list[str] = field(default_factory=list)


def export(deployment: Deployment, request: Request, progress: Progress) -> list[Path]:
    """Writes what is asked for and returns the folders.

    Raises:
        UserError: It can't be made of this run, or there is something else in its place.
    """
    items = _items(deployment, request)
    for item in items:
        check_place(item.folder)
    for number, item in enumerate(items):
        progress(item.name, number, len(items))
        _write(deployment, request, item, partial(progress, item.name))
        progress(item.name, number + 1, len(items))
    return [item.folder for item in items]


def _items(deployment: Deployment, request: Request) -> list[_Item]:
    tasks = deployment.named(request.tasks)
    parent = request.output or deployment.folder / "exports" / request.kind
    whole = all(deployment.tasks[name].adapter is None for name in tasks)
    if whole and (request.kind == "adapter" or request.combination):
        raise UserError(
            f"{deployment.folder}: its whole model was trained (adapters=full), so there are no adapters. Take "
            "--format merged or gguf-ready, without --combine."
        )
    if whole:  # one model for all of its tasks, whichever are named
        return [_Item("model", list(deployment.tasks), None, request.output or parent / "model")]
    if request.combination:
        assert request.name is not None
        if request.name in deployment.tasks:
            raise UserError(f"--name {request.name}: is one of the run's tasks. Choose another name.")
        return [_Item(request.name, tasks, None, request.output or parent / request.name)]
    if len(request.tasks) == 1:
        name = tasks[0]
        return [_Item(name, [name], deployment.tasks[name].adapter, request.output or parent / name)]
    return [_Item(name, [name], deployment.tasks[name].adapter, parent / name) for name in tasks]


def _write(deployment: Deployment, request: Request, item: _Item, on_layer: OnLayer) -> None:
    with published(item.folder) as folder:
        checked, unchecked = list[str](), list[str]()
        tokenizer = load_tokenizer(deployment.base, deployment.cache_dir)
        generation = generation_config(deployment, tokenizer, item.tasks)
        dtype = ""
        if request.kind == "adapter":
            _write_adapter(deployment, request, item, folder, on_layer)
            generation.save_pretrained(str(folder))
        else:
            dtype = checkpoint_dtype(deployment) if request.dtype == "auto" else request.dtype
            model = _merged(deployment, request, item, on_layer)
            model.generation_config = generation
            write_model(model, folder, dtype)
        write_tokenizer(tokenizer, folder)
        write_export_file(folder, deployment, item.tasks, request.kind)
        if request.kind == "gguf-ready":
            copy_sentencepiece(deployment, folder)
            checked, unchecked = check_for_gguf(folder)
        results = read_results(deployment.folder / "results.json")
        card = Card(item.name, request.kind, item.tasks, dtype, results, item.notes, checked, unchecked)
        (folder / "README.md").write_text(card_text(card, deployment), encoding="utf-8")


def _write_adapter(deployment: Deployment, request: Request, item: _Item, folder: Path, on_layer: OnLayer) -> None:
    if request.combination is None:
        assert item.adapter is not None
        _copy_adapter(item.adapter, folder, deployment)
        return
    combined = folder / ".combined"
    adapters = _adapters(deployment, item, request.combination)
    model = load_model(deployment.model, deployment.cache_dir)
    left_out = write_combined(model, adapters, request.combination, combined, on_layer)
    if request.combination.method != "sum":
        item.notes.append(f"Of the combination, the rank leaves out {left_out:.1%} (Frobenius norm of the difference)")
    _copy_adapter(combined, folder, deployment)
    shutil.rmtree(combined)


def _merged(deployment: Deployment, request: Request, item: _Item, on_layer: OnLayer) -> Any:  # noqa: ANN401
    if request.combination is not None:
        adapters = _adapters(deployment, item, request.combination)
        return merge_combined(load_untied(deployment, adapters), adapters, request.combination, on_layer)
    model, difference = merged_model(deployment, item.adapter)
    if difference > MAX_DIFFERENCE:
        raise UserError(
            f"{item.name}: merging has moved the logits by {difference:.1e} of their norm, which is more than "
            "rounding. Take --format adapter, and report this."
        )
    if item.adapter is not None:
        item.notes.append(f"Merging has moved the logits of random tokens by {difference:.0e} of their norm")
    return model


def _adapters(deployment: Deployment, item: _Item, combination: Combination) -> list[Path]:
    """The folders to combine; notes how."""
    weights = ", ".join(f"`{name}` {weight:g}" for name, weight in zip(item.tasks, combination.weights, strict=True))
    details = "" if combination.method == "sum" else f", density {combination.density:g}"
    details += f", seed {combination.seed}" if combination.method.startswith("dare") else ""
    item.notes.append(f"Combined of several adapters by `{combination.method}`, weights {weights}{details}")
    adapters = [deployment.tasks[name].adapter for name in item.tasks]
    return [adapter for adapter in adapters if adapter is not None]


def _copy_adapter(adapter: Path, folder: Path, deployment: Deployment) -> None:
    """Copies weights and config; the latter with the base model's name instead of a path in this machine's cache."""
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = deployment.base.name_or_path
    config["base_model_name_or_path"] = base.removeprefix(PACKAGE_PREFIX)
    config["revision"] = deployment.base.revision
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
