"""load_task: from a config to tokens, the fingerprint, and the cache between."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mtl.data import loading
from mtl.data.loading import TaskData, load_task
from mtl.errors import UserError
from mtl.tasks.task import Task

Load = Callable[..., TaskData]
WriteRows = Callable[..., Path]
ROWS = [{"prompt": f"{i} 你好?", "completion": ("yes", "no")[i % 3 == 0]} for i in range(20)]


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Load:
    def load(
        path: Path,
        *,
        tokenizer: PreTrainedTokenizerFast = tokenizer,
        max_length: int = 200,
        seed: int = 0,
        too_long: str = "error",
        **fields: Any,
    ) -> TaskData:
        return load_task(
            Task("mine", str(path), **fields),
            tokenizer,
            max_length=max_length,
            seed=seed,
            cache_dir=tmp_path / "cache",
            too_long=too_long,
        )

    return load


def assert_same(one: TaskData, other: TaskData) -> None:
    for name in ("input_ids", "is_target", "offsets"):
        assert np.array_equal(getattr(one.train, name), getattr(other.train, name))
    for mine, theirs in zip([*one.val, *one.test], [*other.val, *other.test], strict=True):
        assert np.array_equal(mine.tokens.input_ids, theirs.tokens.input_ids)
        assert np.array_equal(mine.tokens.is_target, theirs.tokens.is_target)
        for name in ("prompt", "prompt_ids", "reference", "options", "option_ids", "location"):
            assert getattr(mine, name) == getattr(theirs, name)
    for name in ("majority", "num_dropped", "fingerprint"):
        assert getattr(one, name) == getattr(other, name)


def test_labelled_task_end_to_end(load: Load, write_rows: WriteRows, ids: Callable[[str], list[int]]) -> None:
    data = load(write_rows(train=ROWS[:12], val=ROWS[12:15], test=ROWS[15:]), labels=["no", "yes"])
    assert (data.task.format, data.task.metric, data.task.scoring) == ("prompt_completion", "accuracy", "likelihood")
    assert (len(data.train), len(data.val), len(data.test), data.num_dropped) == (12, 3, 5, 0)
    assert data.majority == "yes"
    assert data.train[0].input_ids.tolist() == ids("<s>user\n0 你好?<e>\n<s>assistant\nno<e>")
    example = data.val[1]
    assert example.location == "val.jsonl:2"
    assert (example.prompt, example.reference, example.options) == ("13 你好?", "yes", ("no", "yes"))
    assert list(example.prompt_ids) == ids("<s>user\n13 你好?<e>\n<s>assistant\n")
    assert example.option_ids == (tuple(ids("no<e>")), tuple(ids("yes<e>")))
    # the prompt with the right option is the training example, token for token
    assert [*example.prompt_ids, *example.option_ids[1]] == example.tokens.input_ids.tolist()
    assert example.tokens.is_target.tolist() == [False] * len(example.prompt_ids) + [True] * 4


def test_row_options(load: Load, write_rows: WriteRows) -> None:
    rows = [{"prompt": f"{i}?", "completion": "ä", "options": ["ä", f"b{i}"]} for i in range(10)]
    data = load(write_rows(train=rows))
    assert (data.task.metric, data.task.scoring, data.majority) == ("accuracy", "likelihood", None)
    example = data.test[0]
    assert example.options == ("ä", "b" + example.prompt[:-1])
    assert example.option_ids == tuple((*option.encode(), 257) for option in example.options)


def test_free_answers(load: Load, write_rows: WriteRows) -> None:
    data = load(write_rows(train=ROWS))
    assert (data.task.metric, data.task.scoring, data.majority) == ("chrf", "generation", None)
    assert (data.val[0].options, data.val[0].option_ids) == (None, None)


def test_several_turns(load: Load, write_rows: WriteRows, ids: Callable[[str], list[int]]) -> None:
    roles = ("user", "assistant", "user", "assistant")
    row = {"messages": [{"role": role, "content": content} for role, content in zip(roles, "1234", strict=True)]}
    example = load(write_rows(train=[row], val=[row], test=[row])).val[0]
    prompt = "<s>user\n1<e>\n<s>assistant\n2<e>\n<s>user\n3<e>\n<s>assistant\n"
    assert list(example.prompt_ids) == ids(prompt)
    assert (example.prompt, example.reference) == ("3", "4")
    assert example.tokens.input_ids[example.tokens.is_target].tolist() == ids("2<e>4<e>")


def test_plain_text(load: Load, write_rows: WriteRows) -> None:
    data = load(write_rows(train=[{"text": f"text {i}"} for i in range(10)]))
    assert (data.task.format, data.task.metric, data.task.scoring) == ("text", "none", "none")
    example = data.val[0]
    assert (example.prompt, example.prompt_ids, example.options) == ("", (), None)
    assert [*example.reference.encode(), 257] == example.tokens.input_ids.tolist()


def test_twenty_examples_are_enough(load: Load, write_rows: WriteRows) -> None:
    data = load(write_rows(train=ROWS))
    assert (len(data.train), len(data.val), len(data.test)) == (16, 2, 2)


def test_cache_is_used_and_gives_the_same(load: Load, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(train=ROWS)
    first = load(path, labels=["no", "yes"])
    os.utime(path / "train.jsonl", (1, 1))
    moved = path.rename(path.with_name("moved"))
    with monkeypatch.context() as patch:
        patch.setattr(loading, "encode_split", None)  # a second encoding would fail
        again = load(moved, labels=["no", "yes"])
        assert_same(first, again)
        with pytest.raises(TypeError):
            load(moved, labels=["no", "yes"], max_length=100)


def test_damaged_cache_is_rebuilt(load: Load, write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows(train=ROWS)
    first = load(path)
    cache = tmp_path / "cache" / "tokens" / f"{first.fingerprint}.safetensors"
    content = cache.read_bytes()
    cache.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_same(first, load(path))
    assert cache.read_bytes() == content


def test_builders_at_once_do_not_disturb_each_other(
    load: Load, write_rows: WriteRows, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    path = write_rows(train=ROWS)
    tokenizers = [make_tokenizer() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(lambda tokenizer: load(path, tokenizer=tokenizer), tokenizers)
    for other in others:
        assert_same(first, other)


def test_fingerprint_follows_what_decides_the_tokens(
    load: Load, write_rows: WriteRows, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    path = write_rows(train=ROWS, val=ROWS[:2], test=ROWS[:2])
    changed = write_rows("changed", train=[*ROWS[:-1], {**ROWS[-1], "prompt": "19 你好!"}], val=ROWS[:2], test=ROWS[:2])
    other_template = make_tokenizer("{% for m in messages %}{{ m.content + '<e>' }}{% endfor %}")
    prints = [
        load(path).fingerprint,
        load(changed).fingerprint,
        load(path, max_length=100).fingerprint,
        load(path, system_prompt="Be brief.").fingerprint,
        load(path, labels=["no", "yes"]).fingerprint,
        load(path, max_train_examples=10).fingerprint,
        load(path, max_train_examples=10, seed=1).fingerprint,
        load(path, tokenizer=other_template).fingerprint,
        load(path, tokenizer=make_tokenizer(None)).fingerprint,
        load(path, tokenizer=make_tokenizer(None, adds_bos=True)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_fingerprint_ignores_what_does_not(
    load: Load, write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_rows(train=ROWS, val=ROWS[:2], test=ROWS[:2])
    before = load(path).fingerprint
    tokenizer(["a", "bb"], padding=True, truncation=True, max_length=8)  # leaves settings in the tokenizer
    assert load(path, seed=1).fingerprint == before  # all splits are given: the seed decides nothing
    assert load(path, metric="bleu", max_new_tokens=3).fingerprint == before


def test_dropped_examples_are_counted(load: Load, write_rows: WriteRows) -> None:
    rows = [*ROWS, {"prompt": "x" * 300, "completion": "yes"}]
    path = write_rows(train=rows, val=rows, test=ROWS)
    with pytest.raises(UserError, match=r"^Task 'mine': train\.jsonl:21 has \d+ tokens and its answer begins at token"):
        load(path)
    for _ in range(2):  # built, then from the cache
        data = load(path, too_long="drop")
        assert (len(data.train), len(data.val), len(data.test), data.num_dropped) == (20, 20, 20, 2)
        assert [example.location for example in data.val] == [f"val.jsonl:{line}" for line in range(1, 21)]


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        (
            ROWS,
            {"max_length": 10, "too_long": "drop"},
            r"Task 'mine' has no training rows left: max_length=10 cuts the",
        ),
        (ROWS, {"max_length": 1}, r"max_length must be at least 2, .*; found 1\."),
        (ROWS, {"too_long": "cut"}, r"too_long must be one of error, drop; found 'cut'\."),
        (ROWS, {"scoring": "likelihood"}, r"tasks\.mine\.scoring: likelihood needs answers to choose from"),
        (ROWS, {"labels": ["no", "maybe"]}, r"Task 'mine': train\.jsonl:2 has the answer 'yes', which is none of "),
        (
            [*ROWS, {"prompt": "?", "completion": "a", "options": ["a", "b"]}],
            {},
            r"Task 'mine': train\.jsonl:21 has \"options\" and train\.jsonl:20 has none\.",
        ),
        ([{"text": "x"}], {"labels": ["a", "b"]}, r"tasks\.mine\.labels: plain text has no answers"),
        ([{"text": "x"}], {"metric": "bleu"}, r"tasks\.mine: plain text has no answers to score"),
        ([{"text": "x"}], {"scoring": "generation"}, r"tasks\.mine: plain text has no answers to score"),
        (ROWS[:2], {}, r"Task 'mine' has no validation rows, and train is too small to take 1 from"),
    ],
)
def test_bad_data_is_one_line(
    load: Load, write_rows: WriteRows, tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(write_rows(train=rows), **options)
    assert re.match(problem, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()  # nothing half-written
