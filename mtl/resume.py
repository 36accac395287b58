"""Where a run goes, and whether a checkpoint fits it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl.checkpoint import find_checkpoint
from mtl.data.loading import TaskData
from mtl.errors import UserError
from mtl.interfaces import AdapterLayout
from mtl.settings import Settings


def open_output(settings: Settings, folder: Path) -> Path | None:
    """Checks that the output folder can be written to and holds no other run; finds the checkpoint to resume from."""
    resume = settings.resume_from_checkpoint
    holds_run = (folder / "metrics.jsonl").exists() or (folder / "results.json").exists()
    if resume is None and holds_run:
        raise UserError(
            f"output_dir={folder} already holds a run. Choose another folder, or go on with "
            "resume_from_checkpoint=auto."
        )
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir={folder}: {existing} is a file. Choose another folder.")
    probe = existing / f".mtl-{uuid.uuid4().hex}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir={folder} can't be written to: {error.strerror}. Choose another folder.") from error
    if resume is None:
        return None
    if resume == "auto":
        return find_checkpoint(folder) if (folder / "checkpoints" / "latest").exists() else None
    checkpoint = find_checkpoint(Path(resume).expanduser())
    if holds_run and checkpoint.resolve().parent.parent != folder.resolve():
        raise UserError(
            f"output_dir={folder} already holds another run than resume_from_checkpoint={resume}. Choose another "
            "folder."
        )
    return checkpoint


def identity_of(settings: Settings, layout: AdapterLayout, data: Sequence[TaskData]) -> dict[str, Any]:
    """What must be the same for a checkpoint's state to fit a run."""
    return {
        "tasks": {item.task.name: len(item.train) for item in data},
        "strategy": dict(settings.strategy),
        "parameters": {name: list(parameter.shape) for name, parameter in layout.named_parameters().items()},
    }


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of other tasks (their order counts), strategies or trainable parameters."""
    for key, remedy in (
        ("tasks", "Give the same tasks, data and order"),
        ("strategy", "Give the same sampler, weighter, surgery, adapters and stages"),
        ("parameters", "Give the same model, ranks and target modules"),
    ):
        before, after = saved[key], now[key]
        if list(before.items()) != list(after.items()):
            names = [*before, *(name for name in after if name not in before)]
            odd = next((name for name in names if before.get(name) != after.get(name)), next(iter(before)))
            raise UserError(
                f"resume_from_checkpoint: the checkpoint has other {key} than this run: {odd} was {before.get(odd)}, "
                f"is {after.get(odd)} (or the order differs). {remedy}, or start a new run."
            )
