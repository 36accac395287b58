"""What a task is: a named data set with a prompt format and a metric."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from mtl.errors import UserError

FORMATS = ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text")
SCORINGS = ("auto", "likelihood", "generation", "none")
RESERVED_NAMES = ("shared", "mean", ".", "..")
MAX_NAME_BYTES = 200  # file systems allow 255 bytes, and a name gets a suffix


@dataclass(frozen=True)
class Task:
    """One task, as its config says it; every field is a key of ``tasks.<name>``.

    Args:
        name: The task's key in the config. Any Unicode text without path separators or control characters; kept in
            Unicode normal form C.
        path: A folder with ``train``/``val``/``test`` files, one file, a ``datasets`` folder, ``builtin:<task>``
            (the tasks that come with the package) or ``hub:<dataset>`` (fetched by ``datasets``).
        format: How a row becomes a conversation; ``auto`` detects it from the keys of the first row.
        metric: A name of :mod:`mtl.evaluation.metrics`; ``auto`` takes accuracy where there are labels or options,
            else chrF, and none for plain text.
        labels: The fixed answers of a classification task. Rows may carry an ``options`` list of their own instead.
        scoring: Whether an answer is chosen by ``likelihood`` among labels or options, or by ``generation``.
        max_new_tokens: Length limit of a generated answer [tokens].
        answer_pattern: Regular expression whose last match (first group, if any) is the answer within a generation;
            where it does not match, the whole first line counts.
        system_prompt: System message put before every row that has none; ``None`` leaves it to the chat template.
        val_size: Share (below 1) or number of rows for validation where the data has no such split.
        test_size: The same for the test split.
        max_train_examples: Use only this many training rows (a seeded sample).

    Raises:
        UserError: If a field breaks its rule.
    """

    name: str
    path: str
    format: str = "auto"
    metric: str = "auto"
    labels: Sequence[str] | None = None
    scoring: str = "auto"
    max_new_tokens: int = 64
    answer_pattern: str | None = None
    system_prompt: str | None = None
    val_size: float = 0.1
    test_size: float = 0.1
    max_train_examples: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _checked_name(self.name))
        if not (isinstance(self.path, str) and self.path.strip()):
            raise self._error("path", "must name a folder, a file, builtin:<task> or hub:<dataset>")
        if self.format not in FORMATS:
            raise self._error("format", f"must be one of {', '.join(FORMATS)}")
        if self.scoring not in SCORINGS:
            raise self._error("scoring", f"must be one of {', '.join(SCORINGS)}")
        if not (isinstance(self.metric, str) and self.metric):
            raise self._error("metric", "must be the name of a metric, or auto")
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise self._error("max_new_tokens", "must be a whole number of at least 1")
        if self.max_train_examples is not None and not (
            _is_int(self.max_train_examples) and self.max_train_examples >= 1
        ):
            raise self._error("max_train_examples", "must be a whole number of at least 1, or null for all rows")
        if not (self.system_prompt is None or isinstance(self.system_prompt, str)):
            raise self._error("system_prompt", "must be text, or null to leave it to the chat template")
        for field in ("val_size", "test_size"):
            if not _is_size(getattr(self, field)):
                raise self._error(field, "must be a share between 0 and 1 or a whole number of rows of at least 1")
        self._check_labels()
        self._check_pattern()

    def _check_labels(self) -> None:
        if self.labels is None:
            return
        if isinstance(self.labels, str) or not isinstance(self.labels, Sequence):
            raise self._error("labels", "must be a list of texts")
        if any(not isinstance(label, str) for label in self.labels):
            # YAML reads a bare yes, no, on or off as a truth value
            raise self._error("labels", "must be texts: put each label in quotes, as in ['yes', 'no']")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2 or not all(map(str.strip, self.labels)):
            raise self._error("labels", "must be at least two different texts, none of them empty")
        object.__setattr__(self, "labels", tuple(self.labels))

    def _check_pattern(self) -> None:
        if self.answer_pattern is None:
            return
        if not isinstance(self.answer_pattern, str):
            raise self._error("answer_pattern", "must be a regular expression, or null")
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise self._error("answer_pattern", f"must be a regular expression ({error})") from None

    def _error(self, field: str, rule: str) -> UserError:
        return UserError(f"tasks.{self.name}.{field} {rule}; found {getattr(self, field)!r}.")


def check_task_names(names: Iterable[str]) -> None:
    """Refuses names that would share a folder on a file system that ignores case.

    Raises:
        UserError: If two names are equal, or equal but for case or Unicode form.
    """
    seen: dict[str, str] = {}
    for name in names:
        folder = unicodedata.normalize("NFC", name.casefold())
        if folder in seen:
            raise UserError(
                f"Task {name!r}: the name collides with task {seen[folder]!r}, since names become folder names and "
                "case does not tell folders apart everywhere. Rename one of them."
            )
        seen[folder] = name


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise UserError(f"Task {name!r}: a name must be text. Put it in quotes.")
    normal = unicodedata.normalize("NFC", name)
    if not normal.strip() or normal != normal.strip():
        raise UserError(f"Task {name!r}: a name must not be empty, nor begin or end with a space. Rename the task.")
    if any(character in "/\\" or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in normal):
        raise UserError(
            f"Task {name!r}: a name becomes a folder name and must not hold '/', '\\' or control characters. "
            "Rename the task."
        )
    if normal.casefold() in RESERVED_NAMES:
        raise UserError(f"Task {name!r}: this name is reserved ({', '.join(RESERVED_NAMES)}). Rename the task.")
    if len(normal.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f"Task {name[:20]!r}...: a name becomes a folder name and must not be longer than {MAX_NAME_BYTES} bytes; "
            f"found {len(normal.encode())}. Shorten it."
        )
    return normal


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    if isinstance(value, float):
        return 0 < value < 1 or (value >= 1 and value.is_integer())
    return _is_int(value) and value >= 1
