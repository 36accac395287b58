"""Rows of every format, and the line that names what is wrong with one."""

from __future__ import annotations

from typing import Any

import pytest

from mtl.errors import UserError
from mtl.tasks.formats import Conversation, Message, Text, detect_format, parse_row
from mtl.tasks.task import Task

QUESTION, ANSWER = Message("user", "Q 你好 🙂"), Message("assistant", "A é")
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "Q 你好 🙂"}, {"role": "assistant", "content": "A é"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q 你好 🙂"}, {"from": "gpt", "value": "A é"}]},
    "prompt_completion": {"prompt": "Q 你好 🙂", "completion": "A é"},
    "alpaca": {"instruction": "Q 你好 🙂", "input": "", "output": "A é"},
}


def parse(row: dict[str, Any], **fields: Any) -> Conversation | Text:
    task = Task("mine", "data", **fields)
    if task.format == "auto":
        task = Task("mine", "data", **{**fields, "format": detect_format(row, task, "train.jsonl:1")})
    return parse_row(row, task, "train.jsonl:17")


@pytest.mark.parametrize("name", ROWS)
def test_formats_are_detected_and_mean_the_same(name: str) -> None:
    assert detect_format(ROWS[name], Task("mine", "data"), "train.jsonl:1") == name
    assert parse(ROWS[name]) == Conversation((QUESTION, ANSWER), None, "train.jsonl:17")


def test_text_is_kept_as_it_is() -> None:
    assert parse({"text": "  Übung 🙂\n"}) == Text("  Übung 🙂\n", "train.jsonl:17")


def test_alpaca_input_follows_the_instruction() -> None:
    parsed = parse({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert isinstance(parsed, Conversation)
    assert parsed.prompt == "Add.\n\n1 2"


def test_alpaca_input_may_be_missing_or_null() -> None:
    for row in ({"instruction": "Add.", "output": "3"}, {"instruction": "Add.", "input": None, "output": "3"}):
        assert parse(row) == Conversation((Message("user", "Add."), Message("assistant", "3")), None, "train.jsonl:17")


def test_turns_keep_their_order_and_system_message() -> None:
    turns = [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    parsed = parse({"messages": [{"role": role, "content": content} for role, content in turns]}, system_prompt="other")
    assert isinstance(parsed, Conversation)
    assert [tuple(message) for message in parsed.messages] == turns
    assert (parsed.prompt, parsed.answer) == ("3", "4")


def test_system_prompt_goes_before_rows_without_one() -> None:
    parsed = parse(ROWS["alpaca"], system_prompt="Be brief.")
    assert isinstance(parsed, Conversation)
    assert parsed.messages == (Message("system", "Be brief."), QUESTION, ANSWER)


def test_options_come_from_the_row_or_else_the_labels() -> None:
    row = {"prompt": "?", "completion": "b"}
    with_options = parse({**row, "options": ["a", "b"]}, labels=["b", "c"])
    with_labels = parse({**row, "options": None}, labels=["b", "c"])
    assert isinstance(with_options, Conversation)
    assert isinstance(with_labels, Conversation)
    assert with_options.options == ("a", "b")
    assert with_labels.options == ("b", "c")


def test_unknown_keys_are_listed_with_every_format() -> None:
    with pytest.raises(UserError) as caught:
        parse({"question": "?", "answer": "!"})
    message = str(caught.value)
    assert message.startswith("Task 'mine': train.jsonl:1 has no \"messages\", no ")
    assert 'no "prompt" with "completion"' in message
    assert "Found keys: question, answer." in message
    assert "tasks.mine.format" in message


@pytest.mark.parametrize(
    ("row", "fields", "problem"),
    [
        (
            {"prompt": "?", "answer": "!"},
            {"format": "prompt_completion"},
            'has no "completion", which format prompt_completion needs. Found keys: prompt, answer. '
            "Rename the key or set tasks.mine.format.",
        ),
        ({"prompt": "?", "completion": " \n"}, {}, 'has an empty "completion"'),
        ({"instruction": "?", "output": ""}, {}, 'has an empty "output"'),
        ({"text": ""}, {}, 'has an empty "text"'),
        ({"prompt": "?", "completion": 3}, {}, 'has "completion" that is no text: 3.'),
        ({"prompt": None, "completion": "x"}, {}, 'has "prompt" that is no text: None.'),
        ({"prompt": "\ud83d", "completion": "x"}, {}, 'has a broken character (half a surrogate pair) in "prompt"'),
        ({"messages": "hi"}, {}, "has \"messages\" that are no list of messages: 'hi'."),
        ({"messages": []}, {}, 'has "messages" that are no list of messages: [].'),
        ({"messages": [{"role": "user"}]}, {}, 'needs "role" and "content" in "messages"[0]. Found keys: role.'),
        ({"messages": [{"role": "tool", "content": "x"}]}, {}, "has the role 'tool' in \"messages\"[0]"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, {}, "has the role ['user'] in \"messages\"[0]"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, 'has "messages" that end with the user'),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]},
            {},
            'has an empty "conversations"[1]["value"]',
        ),
        ({"prompt": "?", "completion": "c", "options": "a, b"}, {}, 'has "options" that are no list of texts'),
        ({"prompt": "?", "completion": "c", "options": ["c"]}, {}, "has \"options\" ['c']; there must be at least two"),
        ({"prompt": "?", "completion": "c", "options": ["c", "c"]}, {}, "has \"options\" ['c', 'c']; there must be"),
        (
            {"prompt": "?", "completion": "c", "options": ["a", "b"]},
            {},
            "has the answer 'c', which is none of its options: a, b.",
        ),
        (
            {"prompt": "?", "completion": "c"},
            {"labels": ["a", "b"]},
            "has the answer 'c', which is none of tasks.mine.labels: a, b.",
        ),
    ],
)
def test_bad_row_is_named_with_its_line(row: dict[str, Any], fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(row, **fields)
    message = str(caught.value)
    assert message.startswith(f"Task 'mine': train.jsonl:17 {problem}")
    assert message.endswith(".")
    assert "\n" not in message
