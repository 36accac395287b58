from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mtl.errors import UserError
from mtl.reporting.json_files import JsonLines, read_json_lines, to_json, write_atomically


def test_golden_line() -> None:
    record = {"step": 1, "loss": {"情感 😀": 0.1, "b": 1e-7}, "w": None, "list": (1, 2.0), "on": True}
    expected = '{"step": 1, "loss": {"情感 😀": 0.1, "b": 1e-07}, "w": null, "list": [1, 2.0], "on": true}'
    assert to_json(record) == expected.encode()


@pytest.mark.parametrize("value", [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2.0**53 + 2])
def test_floats_read_back_exactly(value: float) -> None:
    back = json.loads(to_json([value]))[0]
    assert back == value
    assert math.copysign(1, back) == math.copysign(1, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_lacks_becomes_null_at_any_depth(value: float) -> None:
    assert to_json({"a": [{"b": value}, (value, 1.0)]}) == b'{"a": [{"b": null}, [null, 1.0]]}'


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\u2028", "\x00", 'quote " and \\', "\\ud800"])
def test_any_string_reads_back(text: str, tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    log.append({"step": 0, "text": text})
    assert read_json_lines(log.path) == [{"step": 0, "text": text}]


def test_every_append_is_on_disk_at_once(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    for step in range(3):
        log.append({"step": step})
        assert log.path.read_bytes().count(b"\n") == step + 1


def test_truncation_keeps_earlier_lines_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept = b'{"step":1,  "loss": 0.10}\n{"step": 2}\n{"step": 2, "eval": {}}\n'
    path.write_bytes(kept + b'{"step": 3}\n{"step": 4}\n')
    JsonLines(path).truncate_after(2)
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("torn", [b"", b'{"step": 2, "lo', b'{"step": 1}', b"\x00\x00\x00", "情".encode()[:1]])
def test_a_torn_last_line_is_dropped(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert read_json_lines(path) == [{"step": 1}]
    log = JsonLines(path)
    log.truncate_after(5)
    log.append({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("damage", [b"{oops", b"[1]", b"", b"\xff"])
def test_damage_in_the_middle_names_the_line(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    content = b'{"step": 1}\n' + damage + b'\n{"step": 2}\n'
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"log\.jsonl:2: a line must be one JSON object") as raised:
        JsonLines(path).truncate_after(1)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == content


def test_truncating_a_log_that_is_not_there_is_fine(tmp_path: Path) -> None:
    JsonLines(tmp_path / "log.jsonl").truncate_after(0)
    assert not any(tmp_path.iterdir())


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
