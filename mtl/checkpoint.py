"""Checkpoints: atomic, verified, exact; JSON and safetensors only, never pickle.

A checkpoint is a folder ``step-000100`` with ``state.json``, ``tensors.safetensors`` and ``manifest.json`` (size and
sha256 of both). It is written under a temporary name, synced to disk and renamed, so a folder with its final name is
complete; ``latest`` names the newest one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl.errors import UserError

SCHEMA = 1
FILES = ("state.json", "tensors.safetensors")
LATEST = "latest"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep_last: int) -> Path:
    """Writes ``folder/step-<step>`` and then deletes all but the newest ``keep_last`` checkpoints.

    Args:
        folder: The run's ``checkpoints`` folder.
        step: Optimizer steps done.
        state: Nested dicts and lists of JSON values and tensors.
        keep_last: How many to keep, at least 1.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    (temporary / "state.json").write_text(json.dumps(pack(state, tensors), ensure_ascii=False), encoding="utf-8")
    save_file(tensors, temporary / "tensors.safetensors")
    files = {name: {"size": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in FILES}
    manifest = {"schema": SCHEMA, "step": step, "files": files, "versions": versions()}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)  # left by a run that was resumed from an older checkpoint
    temporary.rename(final)
    pointer = folder / f"{LATEST}.tmp"
    pointer.write_text(final.name, encoding="utf-8")
    sync(pointer)
    pointer.replace(folder / LATEST)
    sync(folder)
    complete = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdecimal()}
    for stale in [number for number in complete if number > step]:  # of a run that was resumed from before them
        shutil.rmtree(complete.pop(stale))
    for old in sorted(complete)[:-keep_last]:
        shutil.rmtree(complete[old])
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint after checking every file against the manifest.

    Args:
        path: A ``step-*`` folder, a ``checkpoints`` folder or a run folder (the last two: their latest checkpoint).

    Raises:
        UserError: There is none, or a file is missing, truncated or changed.
    """
    folder = find_checkpoint(path)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name in FILES:
            expected = manifest["files"][name]
            file = folder / name
            if file.stat().st_size != expected["size"] or sha256(file) != expected["sha256"]:
                raise UserError(
                    f"{file} is damaged: its size or sha256 is not that of manifest.json. Resume from an older "
                    "checkpoint."
                )
        tensors = load_file(folder / "tensors.safetensors")
        state = unpack(json.loads((folder / "state.json").read_text(encoding="utf-8")), tensors)
    except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} can't be read: {error}. Resume from an older checkpoint.") from error
    assert isinstance(state, dict)
    return state


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that ``path`` means."""
    for folder in (path, path / "checkpoints"):
        if (folder / "manifest.json").is_file():
            return folder
        if (folder / LATEST).is_file():
            return folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    raise UserError(
        f"resume_from_checkpoint={path}: no checkpoint there. Give a run folder or one of its checkpoints/step-*."
    )


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """Moves the tensors of nested state into ``tensors`` and leaves JSON behind; :func:`unpack` is its inverse."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: pack(item, tensors) for key, item in value.items()}
        return {"__items__": [[key, pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"__tuple__": [pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"A checkpoint holds JSON values and tensors only, not {type(value).__name__}: {value!r}")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """Puts back what :func:`pack` took apart."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__items__" in value:
        return {key: unpack(item, tensors) for key, item in value["__items__"]}
    if "__tuple__" in value:
        return tuple(unpack(item, tensors) for item in value["__tuple__"])
    return {key: unpack(item, tensors) for key, item in value.items()}


def versions() -> dict[str, str | int]:
    """What bit-for-bit equality depends on beside the config."""
    import accelerate
    import peft
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "threads": torch.get_num_threads(),
    }


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
