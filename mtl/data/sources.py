"""Where rows come from: JSONL, JSON, CSV and Parquet files, ``datasets`` folders and names, the builtin tasks."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mtl.errors import UserError
from mtl.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
SPLIT_WORDS = {"train": "training", "val": "validation", "test": "test"}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_FILE = re.compile(rf"(?P<split>{'|'.join(SPLIT_NAMES)})(?P<shard>-\d+-of-\d+)?")


class Row(NamedTuple):
    """One row with its place for messages, such as ``train.jsonl:17`` (a line for text files, else a count from 1)."""

    values: Mapping[str, Any]
    location: str


def read_splits(task: Task) -> dict[str, list[Row]]:
    """Reads every split that the task's data have: ``train`` always, ``val`` and ``test`` where present.

    Raises:
        UserError: If something is missing, empty, ambiguous or broken; the message names the file and line.
    """
    path = _local_path(task)
    splits = _from_datasets(_load_from_hub(task)) if path is None else _read_path(path)
    if "train" not in splits:
        raise UserError(
            f"Task {task.name!r}: {task.path} has no training split. Name a file train.jsonl (.json, .csv, .parquet), "
            f"or give tasks.{task.name}.path the training file itself."
        )
    for split, rows in splits.items():
        if not rows:
            remedy = "Fill it." if split == "train" else "Fill it, or remove it and have the split made from train."
            raise UserError(
                f"Task {task.name!r} has no {SPLIT_WORDS[split]} rows: the {split} split of {task.path} is empty. "
                f"{remedy}"
            )
    return splits


def source_files(task: Task) -> list[Path]:
    """The files that :func:`read_splits` reads; none for a data set on the Hub.

    Raises:
        UserError: If there is nothing at the task's path, or several files for one split.
    """
    path = _local_path(task)
    if path is None:
        return []
    if path.is_file():
        return [path]
    if _is_datasets_folder(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [file for files in _split_files(path).values() for file in files]


def builtin_names() -> list[str]:
    """The names of the tasks that come with the package."""
    suite = Path(str(resources.files("mtl.tasks") / "suite"))
    return sorted(folder.name for folder in suite.iterdir() if folder.is_dir())


def read_file(path: Path) -> list[Row]:
    """Reads one data file by its suffix.

    Raises:
        UserError: If the file cannot be read or a line of it is broken.
    """
    match path.suffix.lower():
        case ".jsonl":
            return list(_read_json_lines(path, _read_text(path)))
        case ".json":
            text = _read_text(path)
            is_array = text.lstrip().startswith("[")
            return list(_read_json_array(path, text) if is_array else _read_json_lines(path, text))
        case ".csv":
            return list(_read_csv(path, _read_text(path)))
        case ".parquet":
            return _read_parquet(path)
        case suffix:
            raise UserError(f"{path} has the suffix {suffix!r}; data files are {', '.join(SUFFIXES)}. Convert it.")


def _builtin_folder(name: str, task: Task) -> Path:
    if name not in builtin_names():
        raise UserError(
            f"tasks.{task.name}.path: there is no builtin task {name!r}. Take one of {', '.join(builtin_names())}."
        )
    return Path(str(resources.files("mtl.tasks") / "suite" / name))


def _local_path(task: Task) -> Path | None:
    """The file or folder of a task's data; ``None`` if they are on the Hub."""
    scheme, _, name = task.path.partition(":")
    if scheme == "hub":
        return None
    path = _builtin_folder(name, task) if scheme == "builtin" else Path(task.path).expanduser()
    if not path.is_file() and not path.is_dir():
        raise UserError(
            f"tasks.{task.name}.path: {task.path!r} does not exist. Correct the path, which is relative to the "
            "directory that the command runs in, or put hub: before the name of a data set on the Hub."
        )
    return path


def _is_datasets_folder(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _read_path(path: Path) -> dict[str, list[Row]]:
    if path.is_file():
        return {"train": read_file(path)}
    if _is_datasets_folder(path):
        return _from_datasets(_load_from_disk(path))
    return {split: [row for file in files for row in read_file(file)] for split, files in _split_files(path).items()}


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split; several only where they are numbered shards, as ``train-00000-of-00002.parquet``."""
    files: dict[str, list[Path]] = {}
    is_whole: dict[str, bool] = {}
    for path in sorted(folder.iterdir()):
        match = SPLIT_FILE.fullmatch(path.stem.lower())
        if match is None or path.suffix.lower() not in SUFFIXES:
            continue
        split = SPLIT_NAMES[match["split"]]
        files.setdefault(split, []).append(path)
        is_whole[split] = is_whole.get(split, False) or match["shard"] is None
    for split, paths in files.items():
        if len(paths) > 1 and is_whole[split]:
            names = ", ".join(path.name for path in paths)
            raise UserError(f"{folder} has several files for the {split} split: {names}. Keep one of them.")
    return files


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Correct its permissions.") from None
    try:
        return content.decode("utf-8-sig")  # a byte order mark, as Excel writes it, is no part of the data
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from None


def _read_json_lines(path: Path, text: str) -> Iterable[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also break at U+2028 within a text
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not JSON: {error}. Correct or remove the line.") from None
        yield _row(path, number, values)


def _read_json_array(path: Path, text: str) -> Iterable[Row]:
    try:
        items = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line} is not JSON: {error}. Correct the file.") from None
    for number, values in enumerate(items, start=1):
        yield _row(path, number, values)


def _row(path: Path, number: int, values: object) -> Row:
    if not isinstance(values, dict):
        raise UserError(
            f'{path}:{number} is no JSON object but {type(values).__name__}. Write each row as {{"prompt": ...}}.'
        )
    return Row(values, f"{path.name}:{number}")


def _read_csv(path: Path, text: str) -> Iterable[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1  # the first of a row's lines; a quoted field may hold line breaks
    try:
        for fields in reader:
            if header is None:
                header = fields
            elif fields:
                if len(fields) != len(header):
                    raise UserError(
                        f"{path}:{line} has {len(fields)} fields where the header has {len(header)}. "
                        "Put fields that hold commas or quotes in double quotes."
                    )
                yield Row(dict(zip(header, fields, strict=True)), f"{path.name}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line} is not CSV: {error}. Correct the quotes of the line.") from None


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as Parquet: {_first_line(error)}. Write the file again.") from None
    return [Row(values, f"{path.name}:{number}") for number, values in enumerate(rows, start=1)]


def _load_from_disk(folder: Path) -> Dataset | DatasetDict:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes the library raise
        raise UserError(
            f"{folder} cannot be read as a datasets folder: {_first_line(error)}. Save it again with save_to_disk."
        ) from None


def _load_from_hub(task: Task) -> DatasetDict:
    import datasets

    dataset, _, config = task.path.removeprefix("hub:").partition(":")
    try:
        return datasets.load_dataset(dataset, config or None)
    except Exception as error:  # network, authorisation, unknown names and configs: all of the library's own kinds
        raise UserError(
            f"tasks.{task.name}.path: {task.path!r} cannot be loaded: {_first_line(error)}. "
            "Check the name (hub:name or hub:name:config) and the network."
        ) from None


def _from_datasets(loaded: Dataset | DatasetDict) -> dict[str, list[Row]]:
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    splits: dict[str, list[Row]] = {}
    for name, dataset in loaded.items():
        if (split := SPLIT_NAMES.get(str(name))) is not None:
            splits.setdefault(split, []).extend(
                Row(values, f"{name}:{number}") for number, values in enumerate(dataset.to_list(), start=1)
            )
    return splits


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
