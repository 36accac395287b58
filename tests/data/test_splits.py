"""Carved splits: seeded, disjoint by prompt, of the size asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest

from mtl.data.splits import MAX_CARVED, make_splits
from mtl.errors import UserError
from mtl.tasks.formats import Conversation, Example, Message, Text
from mtl.tasks.task import Task


def examples(num_prompts: int, per_prompt: int = 1) -> list[Example]:
    return [
        Conversation((Message("user", f"q{prompt}"), Message("assistant", f"a{copy}")), None, f"{prompt}.{copy}")
        for prompt in range(num_prompts)
        for copy in range(per_prompt)
    ]


def split(train: Sequence[Example], *, seed: int = 0, given: dict[str, list[Example]] | None = None, **fields: Any):
    return make_splits({"train": train, **(given or {})}, Task("mine", "data", format="messages", **fields), seed)


def prompts(rows: list[Example]) -> set[str]:
    return {row.text if isinstance(row, Text) else row.prompt for row in rows}


@pytest.mark.parametrize(("size", "count"), [(0.1, 20), (0.25, 50), (7, 7), (0.001, 1), (90, 90)])
def test_unique_prompts_give_the_exact_number(size: float, count: int) -> None:
    splits = split(examples(200), val_size=size, test_size=size)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [200 - 2 * count, count, count]


def test_splits_partition_the_rows_and_keep_their_order() -> None:
    rows = examples(30, per_prompt=3)
    splits = split(rows)
    positions = [[rows.index(row) for row in part] for part in splits.values()]
    assert sorted(chain.from_iterable(positions)) == list(range(90))
    assert all(part == sorted(part) for part in positions)


@pytest.mark.parametrize("per_prompt", [2, 3, 7])
def test_rows_of_one_prompt_stay_together(per_prompt: int) -> None:
    splits = split(examples(40, per_prompt), val_size=10, test_size=10)
    parts = [prompts(part) for part in splits.values()]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    # the nearest multiple to 10: 10, 9, 7
    assert len(splits["val"]) == len(splits["test"]) == {2: 10, 3: 9, 7: 7}[per_prompt]


def test_nearest_number_may_lie_above() -> None:
    assert len(split(examples(20, per_prompt=4), val_size=7, given={"test": examples(1)})["val"]) == 8


def test_one_row_asked_of_pairs_gives_a_pair() -> None:
    assert len(split(examples(10, per_prompt=2), val_size=1, given={"test": examples(1)})["val"]) == 2


def test_system_prompt_does_not_tell_prompts_apart() -> None:
    rows: list[Example] = [
        Conversation((Message("system", f"s{i}"), Message("user", f"q{i % 5}"), Message("assistant", "a")))
        for i in range(50)
    ]
    splits = split(rows)
    assert not prompts(splits["train"]) & (prompts(splits["val"]) | prompts(splits["test"]))


def test_equal_texts_stay_together() -> None:
    splits = split([Text(f"t{i % 10}") for i in range(100)])
    assert not prompts(splits["train"]) & (prompts(splits["val"]) | prompts(splits["test"]))


def test_seed_decides_and_row_order_does_not() -> None:
    rows = examples(100)
    first, again, other = split(rows, seed=1), split(rows[::-1], seed=1), split(rows, seed=2)
    for name in ("val", "test"):
        assert prompts(first[name]) == prompts(again[name]) != prompts(other[name])


def test_shares_stop_at_the_limit_and_counts_do_not() -> None:
    splits = split(examples(6000), val_size=0.2, test_size=600)
    assert (len(splits["val"]), len(splits["test"])) == (MAX_CARVED, 600)


def test_given_splits_stay() -> None:
    val, test = examples(3), examples(2)
    splits = split(examples(20), given={"val": val, "test": test})
    assert (len(splits["train"]), splits["val"], splits["test"]) == (20, val, test)


def test_sample_is_seeded_and_leaves_the_other_splits() -> None:
    rows = examples(100)
    whole, first, again, other = (
        split(rows, seed=seed, max_train_examples=limit) for seed, limit in ((1, None), (1, 30), (1, 30), (2, 30))
    )
    assert len(first["train"]) == 30
    assert first == again
    assert prompts(first["train"]) < prompts(whole["train"])
    assert prompts(first["train"]) != prompts(other["train"])
    assert first["val"] == whole["val"]
    assert len(split(rows, max_train_examples=1000)["train"]) == 80


@pytest.mark.parametrize(
    ("rows", "fields", "problem"),
    [
        (examples(1), {}, "has no test rows, and train is too small to take 1 from: it has 1 rows left, with 1"),
        (examples(2), {}, "has no validation rows, and train is too small to take 1 from: it has 1 rows left"),
        (
            examples(1, per_prompt=50),
            {},
            "has no test rows, and train is too small to take 5 from: it has 50 rows left, with 1 ",
        ),
        (
            examples(10),
            {"val_size": 9},
            "has no validation rows, and train is too small to take 9 from: it has 9 rows left, with 9 ",
        ),
        (
            examples(10),
            {"test_size": 10},
            "has no test rows, and train is too small to take 10 from: it has 10 rows left",
        ),
    ],
)
def test_too_little_to_carve_from_is_an_error(rows: list[Example], fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        split(rows, **fields)
    assert str(caught.value).startswith(f"Task 'mine' {problem}")
    assert "_size." in str(caught.value)


def test_training_keeps_a_prompt_where_taking_all_would_be_nearer() -> None:
    rows = [*examples(1, per_prompt=2), *examples(2, per_prompt=3)[3:]]
    for seed in range(10):
        assert split(rows, seed=seed, val_size=4, given={"test": examples(1)})["train"]


def test_training_keeps_a_row_however_few_there_are() -> None:
    for num_prompts in range(3, 12):
        splits = split(examples(num_prompts, per_prompt=2), val_size=1, test_size=1)
        assert all(splits.values())
