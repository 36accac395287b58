"""A sweep on disk: what was asked for, and what became of each of its jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtl.errors import UserError
from mtl.reporting.json_files import to_json, write_atomically

RECORD = "sweep.json"
FAILURE = "failure.json"
CHARTS = "tensorboard"


@dataclass(frozen=True)
class SweepRecord:
    """What a sweep was asked for.

    Args:
        overrides: Of its command.
        config_dir: Of the user's own configs.
        jobs: Names of all jobs, which are those of their folders; empty for a search, which finds them as it goes.
    """

    overrides: Sequence[str]
    config_dir: str | None
    jobs: Sequence[str]


@dataclass(frozen=True)
class SweepJob:
    """A job, and how far it has come: ``finished``, ``failed``, ``interrupted`` or ``not started``."""

    name: str
    status: str
    error: str = ""


def open_sweep(folder: Path, record: SweepRecord, *, resume: bool) -> None:
    """Makes the folder of a new sweep, or takes up that of an old one.

    Raises:
        UserError: The folder can't be made, or holds a sweep that is not to be resumed, or none that could be.
    """
    if is_sweep(folder) and not resume:
        raise UserError(
            f"sweep.dir={folder}: holds a sweep already. Finish it with sweep.resume=true, or choose another folder."
        )
    if resume:
        read_sweep(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RECORD, to_json(asdict(record), indent=2) + b"\n")
    except OSError as error:
        raise UserError(f"sweep.dir={folder} can't be written to: {error.strerror}. Choose another folder.") from error


def is_sweep(folder: Path) -> bool:
    """Whether a sweep has been started there."""
    return (folder / RECORD).is_file()


def read_sweep(folder: Path) -> SweepRecord:
    """What the sweep of a folder was asked for.

    Raises:
        UserError: There is none, or its record is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"sweep.dir={folder}: holds no sweep (there is no {RECORD}). Name the folder of a sweep.")
    try:
        return SweepRecord(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: must be what a sweep has written, found: {error}. Start a new sweep.") from error


def record_failure(folder: Path, code: int, error: str) -> None:
    """Leaves word in a job's folder that it has failed, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FAILURE, to_json({"code": code, "error": error}) + b"\n")


def clear_failure(folder: Path) -> None:
    """Forgets an earlier failure."""
    (folder / FAILURE).unlink(missing_ok=True)


def link_charts(folder: Path) -> None:
    """Shows a job's charts to TensorBoard by the job's own name, in the sweep's folder ``tensorboard``."""
    link = folder.parent / CHARTS / folder.name
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..", folder.name, CHARTS), target_is_directory=True)


def jobs_of(folder: Path) -> list[SweepJob]:
    """All jobs of a sweep, in its order; those of earlier commands in the same folder come last.

    Raises:
        UserError: There is no sweep.
    """
    names = list(read_sweep(folder).jobs)
    names += sorted(path.name for path in folder.iterdir() if path.name not in names and _is_job(path))
    return [_job(folder / name) for name in names]


def unfinished(jobs: Sequence[SweepJob]) -> Iterator[str]:
    """A line for each job that has not finished."""
    width = max((len(job.name) for job in jobs), default=0)
    for job in jobs:
        if job.status != "finished":
            yield f"  {job.name:{width}}  {job.status}{f': {job.error}' if job.error else ''}"


def _is_job(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.yaml", "results.json", FAILURE))


def _job(folder: Path) -> SweepJob:
    if (folder / "results.json").is_file():
        return SweepJob(folder.name, "finished")
    failure = _failure(folder / FAILURE)
    if failure is not None:
        status = "interrupted" if failure["code"] > 128 else "failed"
        return SweepJob(folder.name, status, "" if status == "interrupted" else failure["error"])
    return SweepJob(folder.name, "interrupted" if _is_job(folder) else "not started")


def _failure(path: Path) -> Mapping[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content
