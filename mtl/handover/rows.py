"""Rows to answer: those of :mod:`mtl.tasks.formats`, with the right answer or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from mtl.data.sources import SUFFIXES, Row, read_file
from mtl.errors import UserError
from mtl.tasks.formats import Conversation, parse_row
from mtl.tasks.rendering import Renderer
from mtl.tasks.task import Task

# The key of a row's prompt, its format, and the key of its answer.
PROMPTS = (
    ("messages", "messages", None),
    ("conversations", "sharegpt", None),
    ("prompt", "prompt_completion", "completion"),
    ("instruction", "alpaca", "output"),
)
TURNS = {"messages": ("role", "content", "assistant"), "conversations": ("from", "value", "gpt")}
STAND_IN = "?"  # where the answer will be; it is never seen by the model


@dataclass(frozen=True)
class PromptRow:
    """A row to answer.

    Args:
        conversation: Ends with the right answer, or with something in its place.
        reference: The right answer, if the row has it.
    """

    conversation: Conversation
    reference: str | None


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of a prompt, of its options as answers, and of the answer in the row."""

    prompt_ids: Sequence[int]
    option_ids: Sequence[Sequence[int]]
    answer_ids: Sequence[int]


def read_prompts(path: Path, task: Task) -> list[PromptRow]:
    """Reads a file of rows with prompts.

    Raises:
        UserError: It can't be read, or a row has no prompt; the message names file and line.
    """
    if not path.is_file():
        raise UserError(f"--input {path}: must be a file ({', '.join(SUFFIXES)}), and there is none. Correct the path.")
    rows = [_prompt_row(row, task) for row in read_file(path)]
    if not rows:
        raise UserError(f"--input {path}: has no rows. Give a file with prompts.")
    return rows


def tokenize(renderer: Renderer, rows: Sequence[PromptRow]) -> list[PromptTokens]:
    """Renders rows as an evaluation does: piece by piece, so that an answer begins where it did in training."""
    pieces = [renderer.pieces(row.conversation) for row in rows]
    options = [
        [renderer.answer_piece(row.conversation, option).text for option in row.conversation.options or ()]
        for row in rows
    ]
    piece_ids = renderer.tokenize([piece.text for of_row in pieces for piece in of_row])
    option_ids = renderer.tokenize([text for of_row in options for text in of_row])
    tokens = []
    for own_pieces, own_options in zip(pieces, options, strict=True):
        *prompt, answer = [next(piece_ids) for _ in own_pieces]
        tokens.append(PromptTokens(list(chain(*prompt)), [next(option_ids) for _ in own_options], answer))
    return tokens


def _prompt_row(row: Row, task: Task) -> PromptRow:
    found = next((item for item in PROMPTS if item[0] in row.values), None)
    if found is None:
        wanted = ", ".join(f'no "{key}"' for key, _, _ in PROMPTS)
        keys = ", ".join(map(str, row.values)) or "none"
        raise UserError(
            f"Task {task.name!r}: {row.location} has {wanted}. Found keys: {keys}. Rename the key of the prompt."
        )
    key, kind, answer_key = found
    task = replace(task, format=kind)
    options = row.values.get("options") or task.labels
    stand_in = options[0] if isinstance(options, Sequence) and not isinstance(options, str) else STAND_IN
    if answer_key is not None:
        answer = row.values.get(answer_key)
        has_answer = answer is not None and answer != ""  # a CSV has all columns
        values = dict(row.values) if has_answer else {**row.values, answer_key: stand_in}
    else:
        has_answer, values = _with_last_turn(row.values, key, stand_in)
    conversation = parse_row(values, task, row.location)
    assert isinstance(conversation, Conversation)
    return PromptRow(conversation, conversation.answer if has_answer else None)


def _with_last_turn(values: Mapping[str, Any], key: str, stand_in: str) -> tuple[bool, dict[str, Any]]:
    """Whether the turns end with an answer, and the row with one."""
    role_key, content_key, assistant = TURNS[key]
    turns = values[key]
    if not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
        return True, dict(values)  # parse_row says what is wrong
    if turns[-1].get(role_key) in ("assistant", "gpt"):
        return True, dict(values)
    return False, {**values, key: [*turns, {role_key: assistant, content_key: stand_in}]}
