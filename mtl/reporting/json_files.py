"""JSON and JSON Lines files that a crash leaves readable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mtl.errors import UserError


def to_json(value: object, *, indent: int | None = None) -> bytes:
    """``value`` as strict JSON in UTF-8, without escapes where UTF-8 can say it.

    Floats are written by ``repr`` and so read back exactly. NaN and the infinities, which JSON does not have, become
    null: a diverged run still leaves files that every program reads.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)
    # UTF-8 lacks only lone surrogates, and Python's escape of one is JSON's escape of it, so even those survive.
    return text.encode("utf-8", "backslashreplace")


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content``: a reader sees the old file or the new one, also after a crash."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class JsonLines:
    """A file of one JSON object a line, which grows by one line an ``append`` and is complete after each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(to_json(record) + b"\n")

    def sync(self) -> None:
        """Waits until everything appended is on disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def truncate(self, num_records: int) -> int:
        """Keeps the first ``num_records`` records byte for byte, so that a resumed run logs nothing twice.

        A file that is not there has nothing to keep, as where a run goes on in another folder.

        Returns:
            How many records there are now.

        Raises:
            UserError: If the file has fewer, or one of them is no JSON object.
        """
        if not self.path.exists():
            return 0
        kept = [line for line, _ in islice(_lines(self.path), num_records)]
        if len(kept) < num_records:
            raise UserError(
                f"{self.path} has {len(kept)} records, and the checkpoint was saved after {num_records}. Put the file "
                "back, delete it, or give another output_dir."
            )
        write_atomically(self.path, b"".join(kept))
        return len(kept)

    def truncate_after(self, step: int) -> None:
        """Drops every record of a step after ``step``.

        The records kept are kept byte for byte; a torn last line is dropped.

        Raises:
            UserError: If another line is no JSON object.
        """
        if self.path.exists():
            kept = [line for line, record in _lines(self.path) if record["step"] <= step]
            write_atomically(self.path, b"".join(kept))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All records of a JSON Lines file, without a last line that a crash tore (one that lacks its line end).

    Raises:
        UserError: If another line is no JSON object.
    """
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    # Split at b"\n" alone: str.splitlines would also split at U+2028, which may stand in a JSON string.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                found = line[:60].decode("utf-8", "replace").strip()
                raise UserError(f"{path}:{number}: a line must be one JSON object, found {found!r}; delete the line.")
            yield line, record
