"""Where a run goes, and whether a checkpoint fits it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mtl.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from mtl.config_keys import differences, flattened, is_neutral
from mtl.data.loading import TaskData
from mtl.distributed import Distributed
from mtl.errors import UserError
from mtl.interfaces import AdapterLayout
from mtl.options import Options
from mtl.settings import Settings
from mtl.stages import Stage

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "numpy")
ENVIRONMENT = ("micro_batch_tokens", "eval_micro_batch_tokens", "packing", "deterministic")


def open_output(settings: Settings, folder: Path) -> None:
    """Checks that the output folder can be written to and holds no other run.

    Raises:
        UserError: Names the folder and what is wrong with it.
    """
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
    if resume not in (None, "auto") and holds_run and not belongs_to(Path(resume).expanduser(), folder):
        raise UserError(
            f"output_dir={folder} already holds another run than resume_from_checkpoint={resume}. Choose another "
            "folder."
        )


def belongs_to(checkpoint: Path, folder: Path) -> bool:
    """Whether the path is the run folder, its folder of checkpoints or one of these."""
    path, run = checkpoint.resolve(), folder.resolve()
    return path == run or (run / "checkpoints") in (path, path.parent)


def find_checkpoint(resume: str | None, folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, if any, and a warning for each damaged one that was passed over.

    Args:
        resume: ``auto`` (the newest of the output folder, if any), a run folder or one of its checkpoints.
        folder: The output folder.

    Raises:
        UserError: There is none where one was asked for, or the one that was named is damaged.
    """
    if resume is None:
        return None, []
    path = folder if resume == "auto" else Path(resume).expanduser()
    if (path / "manifest.json").is_file() or path.name.startswith("step-"):
        return read_checkpoint(path), []
    newest, damaged = newest_checkpoint(path)
    if newest is None and damaged:
        raise UserError(f"resume_from_checkpoint={resume}: no checkpoint verifies. {damaged[0]} Start a new run.")
    if newest is None and resume != "auto":
        raise UserError(
            f"resume_from_checkpoint={path}: no checkpoint there. Give a run folder or one of its checkpoints/step-*."
        )
    return newest, damaged


def find_origin(settings: Settings, identity: Mapping[str, Any]) -> Checkpoint:
    """The end of the finished run that this one begins with.

    Raises:
        UserError: There is none, it is of other tasks, another model or layout, or it has had all stages already.
    """
    place = f"resume_from={settings.resume_from}"
    origin = end_of(Path(settings.resume_from or "").expanduser(), place)
    saved = origin.state["identity"]
    if list(saved["tasks"]) != list(identity["tasks"]):
        raise UserError(
            f"{place}: has the tasks {', '.join(saved['tasks'])}, and this run {', '.join(identity['tasks'])}. Give "
            "the same tasks in the same order; a stage chooses among them by stages.<name>.tasks."
        )
    for key, remedy in (("model", "the same model"), ("parameters", "the same adapters, ranks and target modules")):
        changed = differences(saved[key], identity[key])
        if changed:
            raise UserError(f"{place}: has other {key} than this run: {changed[0]}. Give {remedy}.")
    first_new_stage(settings.stages, origin.state["run"]["history"])
    return origin


def end_of(path: Path, place: str) -> Checkpoint:
    """The newest checkpoint of a run folder, or the one that ``path`` is, if it was taken at the end of a stage.

    Args:
        path: A run folder or one of its checkpoints.
        place: The option that names it, for messages.

    Raises:
        UserError: There is none that verifies, or it is in the middle of a stage.
    """
    if (path / "manifest.json").is_file() or path.name.startswith("step-"):
        end: Checkpoint | None = read_checkpoint(path)
    else:
        end, _ = newest_checkpoint(path)
    if end is None:
        raise UserError(f"{place}: no checkpoint there that verifies. Give the folder of a finished run.")
    if end.state["parts"] is not None:
        raise UserError(
            f"{place}: is in the middle of a stage. Finish it first (resume_from_checkpoint=auto), or give one of its "
            "checkpoints/step-* at the end of a stage."
        )
    return end


def first_new_stage(stages: Sequence[Stage], history: Sequence[Mapping[str, Any]]) -> int:
    """The place of the first stage after those that another run has had, by their names.

    Raises:
        UserError: It has had them all.
    """
    done = {record["stage"] for record in history}
    for place, stage in enumerate(stages):
        if stage.name not in done:
            return place
    had = ", ".join(stage.name for stage in stages)
    raise UserError(
        f"stage_order: the run of resume_from has had {had} already. Name another stage, as in stages=weak_private."
    )


def identity_of(
    settings: Settings, layout: AdapterLayout, data: Sequence[TaskData], model_fingerprint: str
) -> dict[str, Any]:
    """What decides the numbers of a run, and so must be the same for a checkpoint to belong to it.

    Data and model count by their content, wherever they lie.
    """
    return {
        "config": {key: value for key, value in flattened(settings.config) if not is_neutral(key)},
        "tasks": {item.task.name: f"{len(item.train)} examples, {item.fingerprint[:16]}" for item in data},
        "model": {"weights": model_fingerprint[:16]},
        "parameters": {name: list(parameter.shape) for name, parameter in layout.named_parameters().items()},
    }


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], *, allow_config_change: bool) -> list[str]:
    """Refuses a checkpoint whose numbers are not those of this run.

    Returns:
        A warning, if the run goes on with a changed config because it was told to.

    Raises:
        UserError: Lists what has changed.
    """
    changes = {key: differences(saved[key], now[key]) for key in ("config", "tasks", "model", "parameters")}
    for key, remedy in (
        ("parameters", "Give the same model, ranks and target modules"),
        ("model", "Give the same model"),
        ("tasks", "Give the same tasks, data and order"),
    ):
        # A changed option says more than the shapes that follow from it.
        if changes[key] and not changes["config"]:
            raise UserError(
                f"resume_from_checkpoint: the checkpoint has other {key} than this run: {changes[key][0]} (or the "
                f"order differs). {remedy}, or start a new run."
            )
    if not changes["config"]:
        return []
    listed = "; ".join(changes["config"])
    if not allow_config_change:
        raise UserError(
            f"resume_from_checkpoint: these options would lead to other numbers than the checkpoint's: {listed}. Put "
            "them back, start a new run, or set allow_config_change=true."
        )
    if changes["parameters"] or changes["tasks"]:
        raise UserError(
            f"resume_from_checkpoint: the checkpoint's state does not fit: "
            f"{(changes['parameters'] or changes['tasks'])[0]}. Put back {listed}, or start a new run."
        )
    return [f"going on with a changed config: {listed}"]


def environment_of(options: Options, distributed: Distributed, dtype: torch.dtype) -> dict[str, Any]:
    """What the last bits of a run's numbers depend on, beside its config."""
    return {
        "processes": distributed.world_size,
        "sharded": distributed.sharded,
        "device": distributed.device.type,
        "dtype": f"{dtype} {distributed.accelerator.mixed_precision}",
        "threads": torch.get_num_threads(),
        **{key: getattr(options, key) for key in ENVIRONMENT},
        **{name: version(name) for name in LIBRARIES},
    }


def environment_warnings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A warning, if the run goes on where its numbers will agree to rounding only."""
    changed = differences(*(dict(sorted(environment.items())) for environment in (saved, now)))
    if not changed:
        return []
    return [f"resuming where {'; '.join(changed)}: the numbers go on alike to rounding, not bit for bit"]
