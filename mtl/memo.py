"""Answers kept on disk for as long as the files that they were worked out from stay untouched."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SETTLED_NS = 2_000_000_000  # a file may change again within the tick of its clock, and look the same afterwards


class FileMemo:
    """One answer that was worked out from files, kept in a file of its own.

    A file is untouched if its inode, size, mtime and ctime are what they were. The kernel sets ctime on every change
    and nothing sets it back, so new content of the same size under a restored mtime is noticed too. What is not: a
    change made while the system's clock was set back to the very nanosecond, and one on a network file system that
    shows this machine old attributes. Files whose last change is less than 2 s old are not trusted yet.

    Make it before the files are read: an answer counts for them as they were then, and so never for what changed
    meanwhile.

    Args:
        folder: Where to keep the answer.
        files: All that it is worked out from, the code included; with none that it is safe to trust, nothing is kept.
        inputs: What else decides it; plain data.
    """

    def __init__(self, folder: Path, files: Sequence[Path], inputs: object) -> None:
        self._files = files
        self._states = self._look()
        name = _digest(json.dumps([inputs, [os.path.abspath(file) for file in files]]).encode())
        self._path = folder / f"{name}.json"

    def recall(self) -> Any:  # noqa: ANN401 - whatever was kept
        """The answer as it was kept; ``None`` if there is none, a file has been touched, or the answer is damaged."""
        try:
            head, _, body = self._path.read_bytes().partition(b"\n")
            kept = json.loads(head)
            if self._states is None or kept != {"states": self._states, "sha256": _digest(body)}:
                return None
            return json.loads(body) if self._look() == self._states else None
        except (OSError, ValueError):
            return None

    def keep(self, answer: object) -> None:
        """Keeps an answer, plain data, for the files as they were when the memo was made.

        A folder that can't be written to is no mistake here: the answer is worked out again next time.
        """
        if self._states is None:
            return
        body = json.dumps(answer).encode()
        head = json.dumps({"states": self._states, "sha256": _digest(body)}).encode()
        temporary = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}.tmp")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(head + b"\n" + body)
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)

    def _look(self) -> list[list[int]] | None:
        """Inode, size, mtime and ctime of each file; ``None`` where they are no ground to trust."""
        try:
            found = [file.stat() for file in self._files]
        except OSError:
            return None
        if not found or max(state.st_ctime_ns for state in found) > time.time_ns() - SETTLED_NS:
            return None
        return [[state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns] for state in found]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
