"""Finished runs on disk: finding them, reading them, telling which belong together."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mtl.config_keys import flattened, is_neutral
from mtl.errors import UserError
from mtl.reporting.results import Results, read_predictions, read_results
from mtl.sweep_folder import is_sweep, jobs_of

if TYPE_CHECKING:
    from mtl.evaluation.results import Prediction

_Key = tuple[tuple[str, str], ...]

DATA = ("model.name_or_path", ".path")  # keys that leave a checkpoint's state alone, and the numbers not
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where there is one, ten times as fast
TIME = re.compile(r"\d\d-\d\d-\d\d(-\d+)?")  # what a run's folder is called where nobody names it


@dataclass(frozen=True)
class FinishedRun:
    """A run that has its ``results.json``.

    Args:
        folder: Where it lies.
        results: Its ``results.json``.
        config: Its resolved ``config.yaml``.
        strategy: What runs that differ from it in nothing but the seed have in common, in short.
    """

    folder: Path
    results: Results
    config: Mapping[str, Any]
    strategy: str

    @property
    def seed(self) -> int:
        """What initialized the run and ordered its data."""
        return self.results.seed

    @property
    def metrics_file(self) -> Path:
        """Its ``metrics.jsonl``: a record a step (with ``loss``) or an evaluation (with ``eval``)."""
        return self.folder / "metrics.jsonl"

    @property
    def only_task(self) -> str | None:
        """The task that it was trained on by itself, as a reference for others; None for a run on several tasks."""
        name: str | None = self.config.get("only_task")
        return name

    def predictions(self, task: str) -> list[Prediction]:
        """Of the task's test examples, in the order of the data.

        Raises:
            UserError: The file is missing or damaged.
        """
        return read_predictions(self.folder / "predictions" / f"{task}.jsonl")


@dataclass
class FoundRuns:
    """What lies in some folders.

    Args:
        runs: The finished ones, one for each strategy and seed.
        failures: Jobs of sweeps that ended with an error: name (where two share one, folder) and error.
        notes: What was left out, and why.
    """

    runs: list[FinishedRun] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_runs(paths: Sequence[Path]) -> FoundRuns:
    """The runs in these folders, at any depth, in the order of the paths; sweeps in the order of their jobs.

    Raises:
        UserError: A path does not exist, or holds no finished run.
    """
    found = FoundRuns()
    folders: dict[Path, None] = {}  # in order, each once
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: must be the folder of a run, of a sweep, or one that holds some; there is none.")
        num_known = len(found.failures)
        finished = dict.fromkeys(_finished(path, found))
        if not finished:
            raise UserError(_nothing_finished(path, list(found.failures.items())[num_known:]))
        folders |= finished
    drafts = []
    for folder in folders:
        try:
            drafts.append(_read(folder))
        except UserError as error:
            found.notes.append(f"left out: {error}")
    if not drafts:
        raise UserError(f"No run can be read. {' '.join(found.notes)}".strip())
    found.runs = _unique(_named(drafts), found.notes)
    return found


def _finished(path: Path, found: FoundRuns) -> Iterator[Path]:
    """Folders of finished runs; notes those that are not."""
    if (path / "results.json").is_file():
        yield path
    elif is_sweep(path):
        for job in jobs_of(path):
            if job.status == "finished":
                yield path / job.name
            elif job.status == "failed":
                name = str(path / job.name) if job.name in found.failures else job.name
                found.failures[name] = job.error
            else:
                found.notes.append(f"left out: {path / job.name}: {job.status}")
    elif (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file():
        found.notes.append(f"left out: {path}: has not finished (there is no results.json)")
    else:
        for folder in sorted(item for item in path.iterdir() if item.is_dir()):
            yield from _finished(folder, found)


def _nothing_finished(path: Path, failures: Sequence[tuple[str, str]]) -> str:
    failed = next((f" {name} failed: {error.rstrip('.')}." for name, error in failures), "")
    return f"{path}: holds no finished run (results.json).{failed} Let the training end, or name another."


def _read(folder: Path) -> FinishedRun:
    results = read_results(folder / "results.json")
    if results.seed < 0:
        raise UserError(f"{folder / 'results.json'}: seed must not be negative, found {results.seed}.")
    path = folder / "config.yaml"
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=YAML_LOADER)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: must be the config of the run, found: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold a mapping, found {type(config).__name__}.")
    only_task = config.get("only_task")
    if only_task is not None and not isinstance(only_task, str):
        raise UserError(f"{path}: only_task must be the name of a task or null, found {only_task!r}.")
    return FinishedRun(folder, results, config, "")


def _named(runs: Sequence[FinishedRun]) -> Iterator[FinishedRun]:
    """The runs with the names of their strategies: from the folders where these are telling, else from the configs."""
    keys = [_key(run) for run in runs]
    folders: dict[_Key, set[str]] = {}
    for run, key in zip(runs, keys, strict=True):
        folders.setdefault(key, set()).add(_folder_name(run.folder))
    given = {key: next(iter(names)) if len(names) == 1 else "" for key, names in folders.items()}
    names: dict[_Key, str] = {}
    for key, name in given.items():
        # Single-task runs differ from the others in all that makes them single-task runs.
        alike = [item for item in given if _is_alone(item) == _is_alone(key)]
        common = set.intersection(*(set(item) for item in alike if name in ("", given[item])))
        full = ",".join(filter(None, [name, *(_short(item) for item in key if item not in common)])) or "run"
        taken = {names.get(item) for item in alike}
        names[key] = next(own for own in chain([full], (f"{full} ({i})" for i in count(2))) if own not in taken)
    for run, key in zip(runs, keys, strict=True):
        yield replace(run, strategy=names[key])


def _folder_name(folder: Path) -> str:
    """Without the seed; empty where it is only a time."""
    name = unicodedata.normalize("NFC", re.sub(r"(^|,)seed=\d+", "", folder.resolve().name).strip(","))
    return "" if TIME.fullmatch(name) else name


def _key(run: FinishedRun) -> _Key:
    """What runs of one strategy have in common: dotted keys and their values as JSON.

    They have the model and the data in common, and what the folder is called by: a sweep over ``packing`` compares
    speeds, though it changes no number.
    """
    return tuple(
        (key, json.dumps(value, ensure_ascii=False, default=str))
        for key, value in sorted(flattened(run.config), key=lambda item: item[0])
        if key != "seed" and (not is_neutral(key) or key.endswith(DATA) or f"{key}=" in run.folder.name)
    )


def _is_alone(key: _Key) -> bool:
    return any(name == "only_task" and value != "null" for name, value in key)


def _short(item: tuple[str, str]) -> str:
    """``sampler._target_=mtl.samplers.Equal`` as ``Equal``, another key by its last name."""
    key, value = item[0], item[1].strip('"')
    return value.rpartition(".")[2] if key.endswith("_target_") else f"{key.rpartition('.')[2]}={value}"


def _unique(runs: Iterable[FinishedRun], notes: list[str]) -> list[FinishedRun]:
    """One run for each strategy and seed, the newest; the others are noted."""
    kept: dict[tuple[str, str | None, int], FinishedRun] = {}
    for run in runs:
        place = (run.strategy, run.only_task, run.seed)
        other = kept.get(place)
        if other is not None:
            older, run = sorted((other, run), key=lambda item: (item.folder / "results.json").stat().st_mtime)
            notes.append(f"left out: {older.folder}: {run.folder} is a newer run of the same config and seed")
        kept[place] = run
    return list(kept.values())
