"""How a row of data becomes a conversation or a plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from mtl.errors import UserError
from mtl.tasks.task import Task

# In the order of detection: a row with several sets of keys is the first that fits.
REQUIRED_KEYS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}


class Message(NamedTuple):
    """One turn: ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with an answer; ``options`` are the texts the answer is one of, if there are such."""

    messages: tuple[Message, ...]
    options: tuple[str, ...] | None = None
    location: str = ""

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    @property
    def prompt(self) -> str:
        """The last message of the user, or nothing."""
        return next((message.content for message in reversed(self.messages) if message.role == "user"), "")

    def with_answer(self, answer: str) -> Conversation:
        return replace(self, messages=(*self.messages[:-1], Message("assistant", answer)))


@dataclass(frozen=True, slots=True)
class Text:
    """A text to be learnt as it is, without a prompt."""

    text: str
    location: str = ""


Example: TypeAlias = Conversation | Text


def detect_format(row: Mapping[str, Any], task: Task, location: str) -> str:
    """The first format whose keys the row has.

    Raises:
        UserError: If the row has the keys of no format.
    """
    for name, keys in REQUIRED_KEYS.items():
        if all(key in row for key in keys):
            return name
    wanted = ", ".join("no " + " with ".join(f'"{key}"' for key in keys) for keys in REQUIRED_KEYS.values())
    raise UserError(
        f"Task {task.name!r}: {location} has {wanted}. Found keys: {_key_list(row)}. Rename the keys, or set "
        f"tasks.{task.name}.format if the first row is an exception."
    )


def parse_row(row: Mapping[str, Any], task: Task, location: str) -> Example:
    """Reads a row as ``task.format`` (not ``auto``) says and checks it.

    Args:
        row: The row's keys and values.
        task: Gives the format, the labels and the system prompt.
        location: The row's place for messages, such as ``train.jsonl:17``.

    Raises:
        UserError: If a key is missing, a value has the wrong type, an answer is empty, or it is none of the options.
    """
    reader = _Reader(row, task, location)
    if task.format == "text":
        return Text(reader.text("text", filled=True), location)
    messages = getattr(reader, task.format)()
    if task.system_prompt is not None and messages[0].role != "system":
        messages = [Message("system", task.system_prompt), *messages]
    options = reader.options()
    answer = messages[-1].content
    if options is not None and answer not in options:
        source = "its options" if row.get("options") is not None else f"tasks.{task.name}.labels"
        raise reader.error(f"has the answer {answer!r}, which is none of {source}: {', '.join(options)}. Correct one.")
    return Conversation(tuple(messages), options, location)


@dataclass(frozen=True, slots=True)
class _Reader:
    """One method per format, with the place at hand for messages."""

    row: Mapping[str, Any]
    task: Task
    location: str

    def error(self, problem: str) -> UserError:
        return UserError(f"Task {self.task.name!r}: {self.location} {problem}")

    def messages(self) -> list[Message]:
        return self._turns("messages", "role", "content")

    def sharegpt(self) -> list[Message]:
        return self._turns("conversations", "from", "value")

    def prompt_completion(self) -> list[Message]:
        return [Message("user", self.text("prompt")), Message("assistant", self.text("completion", filled=True))]

    def alpaca(self) -> list[Message]:
        prompt = self.text("instruction")
        if self.row.get("input") is not None and (details := self.text("input")).strip():
            prompt = f"{prompt}\n\n{details}"
        return [Message("user", prompt), Message("assistant", self.text("output", filled=True))]

    def text(self, key: str, *, filled: bool = False) -> str:
        return self._checked(self._value(key), f'"{key}"', filled=filled)

    def options(self) -> tuple[str, ...] | None:
        options = self.row.get("options")
        if options is None:
            return tuple(self.task.labels) if self.task.labels is not None else None
        if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
            raise self.error(f'has "options" that are no list of texts: {options!r}. Write them as ["a", "b"].')
        if len(set(options)) != len(options) or len(options) < 2:
            raise self.error(f'has "options" {options!r}; there must be at least two, all different. Correct them.')
        return tuple(options)

    def _turns(self, key: str, role_key: str, content_key: str) -> list[Message]:
        turns = self._value(key)
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
            raise self.error(f'has "{key}" that are no list of messages: {_shortened(turns)}. Correct the row.')
        messages = []
        for number, turn in enumerate(turns):
            place = f'"{key}"[{number}]'
            if role_key not in turn or content_key not in turn:
                raise self.error(
                    f'needs "{role_key}" and "{content_key}" in {place}. Found keys: {_key_list(turn)}. '
                    f"Rename the keys or set tasks.{self.task.name}.format."
                )
            role = ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
            if role is None:
                raise self.error(
                    f"has the role {turn[role_key]!r} in {place}; a role must be one of {', '.join(ROLES)}. Rename it."
                )
            content = self._checked(turn[content_key], f'{place}["{content_key}"]', filled=role == "assistant")
            messages.append(Message(role, content))
        if messages[-1].role != "assistant":
            raise self.error(
                f'has "{key}" that end with the {messages[-1].role}, not with an answer. Cut the last one.'
            )
        return messages

    def _value(self, key: str) -> object:
        if key not in self.row:
            raise self.error(
                f'has no "{key}", which format {self.task.format} needs. Found keys: {_key_list(self.row)}. '
                f"Rename the key or set tasks.{self.task.name}.format."
            )
        return self.row[key]

    def _checked(self, value: object, place: str, *, filled: bool) -> str:
        if not isinstance(value, str):
            raise self.error(f"has {place} that is no text: {_shortened(value)}. Write it as text.")
        if filled and not value.strip():
            raise self.error(
                f"has an empty {place}; an answer or text to learn cannot be empty. Fill or remove the row."
            )
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which no tokenizer takes
            raise self.error(f"has a broken character (half a surrogate pair) in {place}. Repair the text.") from None
        return value


def _key_list(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
