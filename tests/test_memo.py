"""FileMemo: an answer comes back for untouched files only."""

from __future__ import annotations

import os
import time

import pytest

from mtl import memo
from mtl.memo import FileMemo


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setattr(memo, "SETTLED_NS", 0)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "data" / name for name in ("a", "b")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_text("old")
    return paths


@pytest.fixture
def make(tmp_path, files):
    def make(files=files, inputs=(1, "x")):
        return FileMemo(tmp_path / "memos", files, inputs)

    return make


def next_tick(path):
    """Waits until a change made now gets another ctime than the last one."""
    before, probe = path.stat().st_ctime_ns, path.with_name("probe")
    while not probe.exists() or probe.stat().st_ctime_ns <= before:
        probe.write_text("")
        time.sleep(0.001)
    probe.unlink()


ANSWER = {"text": "é\ud800", "numbers": [1, 2.5, None], "nested": {"a": [True]}}


def test_an_answer_comes_back(make, tmp_path):
    assert make().recall() is None
    make().keep(ANSWER)
    assert make().recall() == ANSWER
    assert [path.suffix for path in (tmp_path / "memos").iterdir()] == [".json"]


def same_size_and_mtime(path):
    times = path.stat().st_mtime_ns
    path.write_text("new")
    os.utime(path, ns=(times, times))


def replaced(path):
    other = path.with_name("other")
    other.write_text("new")
    times = path.stat().st_mtime_ns
    os.utime(other, ns=(times, times))
    other.replace(path)


@pytest.mark.parametrize(
    "touch",
    [
        same_size_and_mtime,
        replaced,
        lambda path: path.write_text("longer"),
        lambda path: path.unlink(),
        lambda path: os.utime(path, (1, 1)),
    ],
)
def test_a_touched_file_voids_it(make, files, touch):
    make().keep(ANSWER)
    early = make()
    next_tick(files[1])
    touch(files[1])
    assert make().recall() is None
    assert early.recall() is None  # touched between looking and reading


def test_other_inputs_or_files_have_answers_of_their_own(make, files):
    make().keep(ANSWER)
    assert make(inputs=(1, "y")).recall() is None
    assert make(files=files[:1]).recall() is None
    assert make(files=files[::-1]).recall() is None
    make(inputs=(1, "y")).keep("another")
    assert make().recall() == ANSWER


def test_what_changed_while_it_was_read_is_not_kept(make, files):
    early = make()
    next_tick(files[0])
    files[0].write_text("new")
    early.keep(ANSWER)
    assert make().recall() is None


def test_fresh_files_are_not_trusted(make, monkeypatch):
    monkeypatch.setattr(memo, "SETTLED_NS", 60_000_000_000)
    make().keep(ANSWER)
    monkeypatch.setattr(memo, "SETTLED_NS", 0)
    assert make().recall() is None
    make().keep(ANSWER)
    monkeypatch.setattr(memo, "SETTLED_NS", 60_000_000_000)
    assert make().recall() is None


def test_without_files_nothing_is_kept(make, tmp_path):
    make(files=[]).keep(ANSWER)
    assert make(files=[]).recall() is None
    assert not (tmp_path / "memos").exists()


def test_a_damaged_answer_counts_as_none(make, tmp_path):
    make().keep(ANSWER)
    [path] = (tmp_path / "memos").iterdir()
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert make().recall() is None, position
        path.write_bytes(content[:position])
        assert make().recall() is None, position
    make().keep(ANSWER)
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_to_is_no_mistake(make, tmp_path):
    (tmp_path / "memos").write_text("a file")
    make().keep(ANSWER)
    assert make().recall() is None
