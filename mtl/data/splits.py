"""Validation and test splits for data that come without, and seeded samples of training rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from mtl.data.sources import SPLIT_WORDS
from mtl.errors import UserError
from mtl.tasks.formats import Example, Text
from mtl.tasks.task import Task

MAX_CARVED = 500  # rows; beyond, a share of a large data set only makes evaluation slow


def make_splits(given: Mapping[str, Sequence[Example]], task: Task, seed: int) -> dict[str, list[Example]]:
    """All three splits: those given, and the missing ones carved from ``train``.

    A carved split is disjoint from train by prompt: examples with the same prompt stay together, so that no answer is
    known from training. Which prompts go is decided by a hash of seed and prompt, so that it does not depend on the
    order of the rows.

    Args:
        given: ``train`` and, where the data have them, ``val`` and ``test``.
        task: Gives ``val_size``, ``test_size`` and ``max_train_examples``.
        seed: Decides which rows go.

    Raises:
        UserError: If train is too small to carve from.
    """
    splits = {split: list(examples) for split, examples in given.items()}
    num_rows = len(splits["train"])
    for split, size in (("test", task.test_size), ("val", task.val_size)):
        if split not in splits:
            count = _num_carved(size, num_rows)
            splits["train"], splits[split] = _carve(splits["train"], split, count, task, seed)
    if task.max_train_examples is not None:
        splits["train"] = _sample(splits["train"], task.max_train_examples, seed)
    return splits


def _num_carved(size: float, num_rows: int) -> int:
    return int(size) if size >= 1 else min(max(round(size * num_rows), 1), MAX_CARVED)


def _carve(
    examples: list[Example], split: str, count: int, task: Task, seed: int
) -> tuple[list[Example], list[Example]]:
    """Takes whole groups of equal prompts in the order of their hash, as near to ``count`` examples as they allow."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_prompt_hash(example, split, seed), []).append(index)
    if count >= len(examples) or len(groups) < 2:
        raise UserError(
            f"Task {task.name!r} has no {SPLIT_WORDS[split]} rows, and train is too small to take {count} from: it has "
            f"{len(examples)} rows left, with {len(groups)} different prompts. Add a {split} file or more rows, or "
            f"lower tasks.{task.name}.{split}_size."
        )
    taken: set[int] = set()
    left_out: list[list[int]] = []
    for _, group in sorted(groups.items()):
        if len(taken) + len(group) <= count:
            taken.update(group)
        else:
            left_out.append(group)
    missing = count - len(taken)
    if missing and len(left_out) > 1:  # one group stays for training
        nearest = min(left_out, key=lambda group: abs(missing - len(group)))
        if not taken or abs(missing - len(nearest)) < missing:
            taken.update(nearest)
    rest = [example for index, example in enumerate(examples) if index not in taken]
    return rest, [examples[index] for index in sorted(taken)]


def _prompt_hash(example: Example, split: str, seed: int) -> str:
    # Everything before the last answer but the system prompt, which rows of a task share
    prompt = (
        example.text
        if isinstance(example, Text)
        else [message for message in example.messages[:-1] if message.role != "system"]
    )
    return hashlib.sha256(json.dumps([seed, split, prompt]).encode()).hexdigest()


def _sample(examples: list[Example], count: int, seed: int) -> list[Example]:
    order = np.random.default_rng(seed).permutation(len(examples))[:count]
    return [examples[index] for index in sorted(order)]
