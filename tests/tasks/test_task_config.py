"""Task: what its fields may be, and the line a user sees otherwise."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest

from mtl.errors import UserError
from mtl.tasks.task import Task, check_task_names


@pytest.mark.parametrize("name", ["sentiment", "情感分析", "my task", "🙂‍↔️ smile", "naïve", "a.b", "-x"])
def test_any_text_that_can_name_a_folder_is_a_name(name: str) -> None:
    assert Task(name, "data").name == unicodedata.normalize("NFC", name)


def test_name_is_normalised_to_form_c() -> None:
    assert Task("e\N{COMBINING ACUTE ACCENT}", "data").name == "é"


@pytest.mark.parametrize(
    "name",
    ["", " ", " x", "x ", "a/b", "a\\b", "a\nb", "a\0", "a\x7f", "\ud83d", ".", "..", "shared", "Mean", "x" * 201],
)
def test_unusable_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^Task .*: .*\.$"):
        Task(name, "data")


def test_name_that_yaml_read_as_a_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"^Task 7: a name must be text"):
        Task(7, "data")  # type: ignore[arg-type]


def test_labels_become_a_tuple() -> None:
    assert Task("x", "data", labels=["yes", "no"]).labels == ("yes", "no")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", ""),
        ("path", None),
        ("format", "json"),
        ("scoring", "magic"),
        ("metric", ""),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("max_train_examples", 0),
        ("max_train_examples", "10"),
        ("system_prompt", 3),
        ("val_size", 0),
        ("val_size", 0.0),
        ("val_size", -0.1),
        ("val_size", 1.5),
        ("val_size", float("nan")),
        ("test_size", True),
        ("test_size", "0.1"),
        ("labels", "yes"),
        ("labels", ["yes"]),
        ("labels", ["yes", "yes"]),
        ("labels", ["yes", " "]),
        ("labels", {"yes": 1, "no": 2}),
        ("answer_pattern", "("),
        ("answer_pattern", 5),
    ],
)
def test_bad_value_is_named_with_its_key(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        Task("mine", "data" if field != "path" else value, **({} if field == "path" else {field: value}))
    message = str(caught.value)
    assert message.startswith(f"tasks.mine.{field} must")
    assert message.endswith(f"found {value!r}.")
    assert "\n" not in message


@pytest.mark.parametrize("size", [0.001, 0.999, 1, 1.0, 500])
def test_sizes_are_shares_or_counts(size: float) -> None:
    assert Task("x", "data", val_size=size, test_size=size).val_size == size


def test_labels_that_yaml_read_as_truth_values_get_the_remedy() -> None:
    with pytest.raises(
        UserError, match=r"^tasks\.x\.labels must be texts: put each label in quotes.*found \[True, False\]"
    ):
        Task("x", "data", labels=[True, False])  # type: ignore[list-item]


@pytest.mark.parametrize("names", [["a", "A"], ["Straße", "STRASSE"], ["é", "e\N{COMBINING ACUTE ACCENT}"], ["a", "a"]])
def test_names_of_one_folder_collide(names: list[str]) -> None:
    with pytest.raises(UserError, match=r"^Task .* collides with task "):
        check_task_names(["other", *names])


def test_different_names_do_not_collide() -> None:
    check_task_names(["a", "b", "情感", "情"])
