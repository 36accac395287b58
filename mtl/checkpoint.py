"""Checkpoints: atomic, verified, exact; JSON and safetensors only, never pickle.

A checkpoint is a folder ``step-000100`` with ``state.json``, ``tensors.safetensors`` and ``manifest.json``, which holds
the sha256 of both and of itself. It is written as ``step-000100.tmp``, synced, read back from the disk, and only then
renamed: a folder with its final name is whole. What a crash leaves behind, moment by moment:

- before the rename: a ``.tmp`` that nobody reads, and every checkpoint as it was;
- where the step has a folder already, that one is first renamed to ``step-000100.old``. It still counts, after a
  ``step-000100``: between the two renames it is the one that is found;
- after the rename: the new checkpoint. ``latest`` may name an older one; it is for people and other tools only;
- while others are deleted: each is first renamed to ``.tmp``, so none is ever seen in part.

Each rename is synced before the next, for a power cut too. The next save clears up.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl.errors import UserError

SCHEMA = 4  # 3 would be one wrong bit away from 1, the schema without a sha256 of its own
STATE, TENSORS, MANIFEST, LATEST = "state.json", "tensors.safetensors", "manifest.json", "latest"
NAME = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,})(\.old)?")


class OtherVersion(UserError):
    """A checkpoint that is whole, but not for this version of the package to read."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: the state after ``step`` optimizer steps, and what equal bits need beside the config."""

    path: Path
    step: int
    state: dict[str, Any]
    environment: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    *,
    environment: Mapping[str, Any],
    value: float | None,
    keep_last: int,
    keep_best: int,
) -> Path:
    """Writes and verifies ``folder/step-<step>``, and only then deletes those that need not be kept.

    Args:
        folder: The run's ``checkpoints`` folder. Made if need be, but never its parents.
        step: Optimizer steps done.
        state: Nested dicts, lists and tuples of JSON values and tensors.
        environment: JSON values that equal bits depend on: world size, device, versions.
        value: How good the parameters are, lower is better. ``None`` or not finite: not among the best.
        keep_last: How many to keep with the highest steps. The one just written is kept in any case.
        keep_best: How many to keep with the lowest values; of equals the newer.

    Raises:
        OSError: It can't be written, or doesn't read back as written. Temporary files are removed if that can be done,
            and every older checkpoint still stands.
    """
    folder.mkdir(exist_ok=True)  # without parents: a disk that went away must not be replaced by an empty folder
    final = folder / f"step-{step:06d}"
    temporary = folder / f"{final.name}.tmp"
    pointer = folder / f"{LATEST}.tmp"
    try:
        clear_leftovers(folder)
        sync(folder.parent)
        write_checkpoint(temporary, step, state, dict(environment), value)
        if final.exists() or final.is_symlink():
            move(final, folder / f"{final.name}.old")
        move(temporary, final)
        pointer.write_text(final.name, encoding="utf-8")
        sync(pointer)
        move(pointer, folder / LATEST)
        clear_leftovers(folder)
        kept = {final, *last_and_best(folder, keep_last, keep_best)}
        for _, path in list_checkpoints(folder):
            if path not in kept:
                discard(path)
    except BaseException:
        with suppress(OSError):
            clear_leftovers(folder)
        raise
    return final


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads one ``step-*`` folder after checking all of it against its manifest.

    Raises:
        UserError: Names the file that is damaged, missing, one too many, or written by another version.
    """
    manifest = verify(folder)
    # load_file maps the file: without a copy the state would need it for as long as it lives itself.
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    state = unpack(json.loads((folder / STATE).read_bytes()), tensors)
    return Checkpoint(folder, manifest["step"], state, manifest["environment"])


def newest_checkpoint(path: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of the highest step that verifies, and for each newer one the reason why it doesn't.

    Args:
        path: A run folder or its ``checkpoints`` folder; need not exist. ``latest`` and foreign names don't matter.

    Raises:
        OtherVersion: A newer one was written by another version: going on from an older one would delete it.
    """
    skipped: list[str] = []
    for _, folder in list_checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path):
        try:
            return read_checkpoint(folder), skipped
        except OtherVersion:
            raise
        except UserError as error:
            skipped.append(str(error))
    return None, skipped


def discard_after(folder: Path, step: int) -> None:
    """Deletes what a crash left, and the checkpoints beyond ``step`` of a run that goes on from there."""
    clear_leftovers(folder)
    for number, path in list_checkpoints(folder):
        if number > step:
            discard(path)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders, the highest step first, a ``.old`` after what took its place."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return sorted(found, key=lambda item: (-item[0], item[1].name))


def last_and_best(folder: Path, keep_last: int, keep_best: int) -> list[Path]:
    """Those with the highest steps and those with the lowest values; a damaged manifest has no value."""
    newest_first = [path for _, path in list_checkpoints(folder)]
    values: dict[Path, float] = {}
    for path in newest_first:
        with suppress(UserError):
            value = read_manifest(path)["value"]
            if value is not None:
                values[path] = value
    return newest_first[:keep_last] + sorted(values, key=lambda path: values[path])[:keep_best]


def clear_leftovers(folder: Path) -> None:
    """Removes temporary files, and ends the replacement of a checkpoint that a crash cut short."""
    for path in folder.glob("*.tmp"):
        if path.stem == LATEST or NAME.fullmatch(path.stem):
            remove(path)
    for _, path in list_checkpoints(folder):
        final = path.with_suffix("")
        if path != final and final.exists():
            discard(path)
        elif path != final:
            move(path, final)


def write_checkpoint(
    folder: Path, step: int, state: dict[str, Any], environment: dict[str, Any], value: float | None
) -> None:
    """Writes a new folder, waits until the disk has it, and reads it back from there."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    (folder / STATE).write_bytes(json.dumps(pack(state, tensors)).encode())
    try:
        save_file(tensors, folder / TENSORS)
    except SafetensorError as error:
        raise OSError(f"{folder / TENSORS}: {error}") from error
    shutil.copymode(folder / STATE, folder / TENSORS)  # safetensors lets nobody but the owner read it
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in (STATE, TENSORS)
    }
    value = value if value is not None and math.isfinite(value) else None
    manifest = {"schema": SCHEMA, "step": step, "value": value, "environment": environment, "files": files}
    as_read = json.loads(json.dumps(manifest, allow_nan=False))  # keys are sorted as the strings that they become
    (folder / MANIFEST).write_bytes(sealed(as_read))
    for path in [*folder.iterdir(), folder]:
        sync(path)
    try:
        verify(folder)
    except UserError as error:
        raise OSError(errno.EIO, f"what was written doesn't read back ({error})") from error


def sealed(manifest: dict[str, Any]) -> bytes:
    """The only bytes that a manifest can have, its own sha256 among them: no bit of them changes unseen."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2, sort_keys=True).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against itself but not against the other files."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no checkpoint there. Give a run folder or one of its checkpoints/step-*.")
    file = folder / MANIFEST
    try:
        content = file.read_bytes()
        manifest = json.loads(content.decode())
    except OSError as error:
        raise damaged(file, f"it can't be read ({error.strerror})") from error
    except ValueError as error:
        raise damaged(file, "it is not JSON") from error
    rest = {key: item for key, item in manifest.items() if key != "sha256"} if isinstance(manifest, dict) else {}
    schema = rest.get("schema")
    if content != sealed(rest) and schema != 1:  # which had no sha256 of its own
        raise damaged(file, "its sha256 is not the one it gives")
    if schema != SCHEMA:
        raise OtherVersion(
            f"{file} was written by another version of mtl: it has schema {schema}, this version reads {SCHEMA}. "
            "Resume with the version that wrote it, or start a new run."
        )
    return rest


def verify(folder: Path) -> dict[str, Any]:
    """Reads every byte of a checkpoint and returns its manifest; raises UserError, see :func:`read_checkpoint`."""
    manifest = read_manifest(folder)
    match = NAME.fullmatch(folder.name)
    if match and int(match[1]) != manifest["step"]:
        raise UserError(f"{folder / MANIFEST} is that of step {manifest['step']}. Give the folder its name back.")
    for name, expected in manifest["files"].items():
        file = folder / name
        try:
            size, digest = file.stat().st_size, sha256(file)
        except OSError as error:
            raise damaged(file, f"it can't be read ({error.strerror})") from error
        if size != expected["size"]:
            raise damaged(file, f"it has {size} bytes instead of {expected['size']}")
        if digest != expected["sha256"]:
            raise damaged(file, f"its sha256 is not that of {MANIFEST}")
    for file in sorted(folder.iterdir()):
        if file.name not in (MANIFEST, *manifest["files"]):
            raise UserError(f"{file} is not part of the checkpoint. Move it away.")
    return manifest


def damaged(file: Path, finding: str) -> UserError:
    """What is wrong with a file of a checkpoint."""
    return UserError(f"{file} is damaged: {finding}. Use an older checkpoint.")


def discard(checkpoint: Path) -> None:
    """Deletes it such that it is never seen in part."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.tmp")
    move(checkpoint, doomed)
    remove(doomed)


def move(source: Path, target: Path) -> None:
    """Renames within a folder, on the disk too."""
    source.replace(target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Deletes a temporary folder, file or link as far as possible: the next save tries again."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """Moves the tensors of nested state into ``tensors`` and leaves JSON behind; :func:`unpack` is its inverse."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: pack(item, tensors) for key, item in value.items()}
        return {"__items__": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
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
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value["__items__"]}
    if "__tuple__" in value:
        return tuple(unpack(item, tensors) for item in value["__tuple__"])
    return {key: unpack(item, tensors) for key, item in value.items()}


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk; who reads it next reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # not on macOS; without it a check after the write sees memory only
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
