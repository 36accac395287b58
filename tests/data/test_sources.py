"""Rows from every kind of source, and one line for everything that can be wrong with one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mtl.data.sources import builtin_names, read_file, read_splits
from mtl.errors import UserError
from mtl.tasks.task import Task

ROWS = [{"prompt": "你好\n🙂", "completion": 'a, "b"'}, {"prompt": "naïve", "completion": "c\u2028d"}]


def splits_of(path: Path | str) -> dict[str, list[dict[str, Any]]]:
    return {split: [dict(row.values) for row in rows] for split, rows in read_splits(Task("mine", str(path))).items()}


def write_csv(path: Path) -> None:
    path.write_text('prompt,completion\n"你好\n🙂","a, ""b"""\nnaïve,c\u2028d\n', encoding="utf-8")


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def write_json_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("train.jsonl", write_jsonl),
        ("lines.json", write_jsonl),
        ("array.json", write_json_array),
        ("train.csv", write_csv),
        ("train.parquet", write_parquet),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    assert splits_of(tmp_path / name) == {"train": ROWS}


def test_locations_are_lines_of_the_file(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv")
    (tmp_path / "train.jsonl").write_text('\n{"a": 1}\n\n{"a": 2}\n')
    write_parquet(tmp_path / "train.parquet")
    assert [row.location for row in read_file(tmp_path / "train.csv")] == ["train.csv:2", "train.csv:4"]
    assert [row.location for row in read_file(tmp_path / "train.jsonl")] == ["train.jsonl:2", "train.jsonl:4"]
    assert [row.location for row in read_file(tmp_path / "train.parquet")] == ["train.parquet:1", "train.parquet:2"]


@pytest.mark.parametrize("alias", ["val", "valid", "validation", "dev"])
def test_splits_go_by_file_name(tmp_path: Path, alias: str) -> None:
    write_csv(tmp_path / "train.csv")
    write_jsonl(tmp_path / f"{alias}.jsonl")
    write_parquet(tmp_path / "test.parquet")
    write_jsonl(tmp_path / "train_old.jsonl")
    (tmp_path / "README.md").write_text("not data")
    assert splits_of(tmp_path) == {"train": ROWS, "val": ROWS, "test": ROWS}


def test_shards_are_joined_in_order(tmp_path: Path) -> None:
    for shard, row in enumerate(ROWS):
        (tmp_path / f"train-0000{shard}-of-00002.jsonl").write_text(json.dumps(row) + "\n")
    assert splits_of(tmp_path) == {"train": ROWS}


def test_byte_order_mark_and_windows_line_ends_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n')
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\r\nx\r\ny\r\n")
    assert splits_of(tmp_path / "a.jsonl") == splits_of(tmp_path / "a.csv") == {"train": [{"text": "x"}, {"text": "y"}]}


def test_saved_datasets_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": data, "validation": data, "unsupervised": data}).save_to_disk(tmp_path / "several")
    assert splits_of(tmp_path / "single") == {"train": ROWS}
    assert splits_of(tmp_path / "several") == {"train": ROWS, "val": ROWS}


def test_hub_names_go_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, str | None]] = []

    def load_dataset(name: str, config: str | None) -> Any:
        asked.append((name, config))
        if name == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist.\nmore lines")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert splits_of("hub:org/name") == splits_of("hub:org/name:fr") == {"train": ROWS}
    assert asked == [("org/name", None), ("org/name", "fr")]
    with pytest.raises(UserError, match=r"^tasks\.mine\.path: 'hub:org/none' cannot be loaded: Dataset .*network\.$"):
        splits_of("hub:org/none")


def test_builtin_tasks_come_with_all_splits() -> None:
    assert set(splits_of("builtin:text2sql")) == {"train", "val", "test"}


@pytest.mark.parametrize("name", ["nope", "", "../suite/g2p", "manifest.json"])
def test_unknown_builtin_task_lists_the_known(name: str) -> None:
    with pytest.raises(UserError) as caught:
        splits_of(f"builtin:{name}")
    assert str(caught.value).startswith(f"tasks.mine.path: there is no builtin task {name!r}.")
    assert ", ".join(builtin_names()) in str(caught.value)


@pytest.mark.parametrize(
    ("files", "path", "problem"),
    [
        ({}, "gone.jsonl", r"tasks\.mine\.path: '.*gone\.jsonl' does not exist\."),
        ({}, ".", r"Task 'mine': .* has no training split\. Name a file train\.jsonl"),
        ({"test.jsonl": b'{"text": "x"}\n'}, ".", r"Task 'mine': .* has no training split\."),
        ({"train.jsonl": b""}, ".", r"Task 'mine' has no training rows: the train split of .* is empty\. Fill it\."),
        ({"a.csv": b"prompt,completion\n"}, "a.csv", r"Task 'mine' has no training rows: "),
        ({"a.json": b"[]"}, "a.json", r"Task 'mine' has no training rows: "),
        ({"train.csv": b"text\nx\n", "val.csv": b""}, ".", r"Task 'mine' has no validation rows: the val split of "),
        ({"train.csv": b"text\nx\n", "test.csv": b""}, ".", r"Task 'mine' has no test rows: the test split of "),
        (
            {"train.csv": b"text\nx\n", "train.jsonl": b""},
            ".",
            r".* has several files for the train split: train\.csv, train\.jsonl\. Keep one of them\.",
        ),
        ({"train.csv": b"text\nx\n", "dev.csv": b"text\nx\n", "val.csv": b"text\nx\n"}, ".", r".* for the val split: "),
        ({"a.jsonl": b'{"text": "x"}\n{"text": \n'}, "a.jsonl", r".*a\.jsonl:2 is not JSON: Expecting value"),
        ({"a.jsonl": b"[" * 100_000}, "a.jsonl", r".*a\.jsonl:1 is not JSON: "),
        ({"a.jsonl": b'"text"\n'}, "a.jsonl", r".*a\.jsonl:1 is no JSON object but str\."),
        ({"a.json": b'[{"text": "x"},\n 3]'}, "a.json", r".*a\.json:2 is no JSON object but int\."),
        ({"a.json": b'[{"text": "x"},\n ?]'}, "a.json", r".*a\.json:2 is not JSON: "),
        ({"a.jsonl": b'{"text": "x"}\n{"text": "\xe9"}\n'}, "a.jsonl", r".*a\.jsonl:2 is not UTF-8 "),
        ({"a.csv": "text\nx\n".encode("utf-16")}, "a.csv", r".*a\.csv:1 is not UTF-8 .* Save the file as UTF-8\."),
        ({"a.csv": b'a,b\n1,2\n"x\ny",2\n1,2,3\n'}, "a.csv", r".*a\.csv:5 has 3 fields where the header has 2\."),
        ({"a.csv": b'a,b\n1,"2\n3,4\n'}, "a.csv", r".*a\.csv:2 is not CSV: "),
        ({"a.parquet": b"PAR1 no"}, "a.parquet", r".*a\.parquet cannot be read as Parquet: "),
        ({"a.xlsx": b""}, "a.xlsx", r".*a\.xlsx has the suffix '\.xlsx'; data files are \.jsonl, "),
        ({"state.json": b"{}"}, ".", r".* cannot be read as a datasets folder: "),
    ],
)
def test_broken_source_is_one_line(tmp_path: Path, files: dict[str, bytes], path: str, problem: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        splits_of(tmp_path / path)
    message = str(caught.value)
    assert re.match(problem, message), message
    assert message.endswith(".")
    assert "\n" not in message
