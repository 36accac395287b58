"""From the examples of a step to micro-batches.

However the step is cut, the numbers are the same: a micro-batch only ever contributes *sums* over its target tokens,
and the denominators belong to the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mtl.interfaces import Segment

if TYPE_CHECKING:
    from mtl.data.tokenized import TokenizedExample


@dataclass(frozen=True)
class MicroBatch:
    """What one forward sees: b rows of S positions, each row holding one example or several packed ones.

    ``keep_BS`` marks the positions whose *next* token is a target; the model computes logits there only. ``labels``
    and ``label_tasks`` list those next tokens and their tasks, row by row. Padding and packed neighbours need no
    attention mask: ``position_ids_BS`` starts again at 0 for every example (and at every padding token), from which
    transformers builds the block-diagonal mask; with one example a row it is ``None``, since causal attention never
    looks at the padding behind it. ``segments`` covers every position, padding with the example before it.
    ``boundaries`` lists where the examples of a single packed row begin, and where the last one ends.
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor | None
    keep_BS: Tensor
    labels: Tensor
    label_tasks: Tensor
    segments: tuple[Segment, ...]
    boundaries: Tensor | None = None

    @property
    def tasks(self) -> tuple[int, ...]:
        """Its tasks, ascending."""
        return tuple(sorted({segment.task for segment in self.segments}))

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on ``device``."""
        return MicroBatch(
            self.input_ids_BS.to(device),
            None if self.position_ids_BS is None else self.position_ids_BS.to(device),
            self.keep_BS.to(device),
            self.labels.to(device),
            self.label_tasks.to(device),
            self.segments,
            None if self.boundaries is None else self.boundaries.to(device),
        )


@dataclass(frozen=True)
class Batch:
    """The B examples of one step over all ranks and micro-batches; every rank holds the same list.

    Args:
        examples: Pairs of task and example.
        num_tasks: T.
    """

    examples: Sequence[tuple[int, TokenizedExample]]
    num_tasks: int

    @cached_property
    def counts_T(self) -> np.ndarray:
        """Examples of each task in the step."""
        return np.bincount([task for task, _ in self.examples], minlength=self.num_tasks)

    @cached_property
    def num_targets_T(self) -> np.ndarray:
        """Target tokens of each task in the step, over all ranks."""
        num_targets_T = np.zeros(self.num_tasks, dtype=np.int64)
        for task, example in self.examples:
            num_targets_T[task] += count_targets(example)
        return num_targets_T

    @property
    def num_tokens(self) -> int:
        """Tokens of the step, padding not counted."""
        return sum(len(example.input_ids) for _, example in self.examples)

    def slice(self, rank: int, world_size: int) -> Batch:
        """The examples of one rank: dealt out by length, so that all ranks get about as many tokens."""
        by_length = sorted(self.examples, key=lambda pair: -len(pair[1].input_ids))
        return Batch(by_length[rank::world_size], self.num_tasks)

    def micro_batches(self, max_tokens: int, *, row_tokens: int, mix_tasks: bool) -> Iterator[MicroBatch]:
        """Cuts the examples into micro-batches of at most ``max_tokens`` positions, padding included.

        Args:
            max_tokens: Budget of a micro-batch; a single longer example still gets one of its own.
            row_tokens: Pack several short examples into one row of so many positions; 0: one example a row.
            mix_tasks: Allow several tasks in one micro-batch.
        """
        groups = [self.examples] if mix_tasks else [self._of_task(int(task)) for task in np.flatnonzero(self.counts_T)]
        for group in groups:
            rows = fill_rows(group, min(row_tokens, max_tokens))
            rows.sort(key=lambda row: -row_length(row))
            while rows:
                fitting = max(1, max_tokens // row_length(rows[0]))
                yield stack(rows[:fitting])
                rows = rows[fitting:]

    def _of_task(self, task: int) -> list[tuple[int, TokenizedExample]]:
        return [pair for pair in self.examples if pair[0] == task]


# Positions of a row where a mask must keep its examples apart. Longer rows waste attention, whose cost grows with the
# square of the row; shorter ones leave gaps. SmolLM2-135M, 16 examples of 50 to 130 tokens, CPU time forward and
# backward: 9.9 s at 384, 11.2 s with one example a row, 11.4 s at 768.
MASKED_ROW_TOKENS = 384

Row = list[tuple[int, "TokenizedExample"]]


def fill_rows(examples: Sequence[tuple[int, TokenizedExample]], capacity: int) -> list[Row]:
    """Packs examples into rows of at most ``capacity`` positions, as few as it finds.

    Where as few rows allow it, a task's examples stay together, so that what belongs to a task alone (its adapter, its
    gradient) is computed in few large pieces. A longer example than the capacity has a row of its own; with a capacity
    of 0 every example has.
    """
    if capacity == 0:
        return [[pair] for pair in examples]
    longest_first = sorted(examples, key=lambda pair: -len(pair[1].input_ids))
    by_task: dict[int, Row] = {}
    for pair in longest_first:
        by_task.setdefault(pair[0], []).append(pair)
    together, apart = sorted(by_task.values(), key=row_length, reverse=True), [[pair] for pair in longest_first]
    num_rows = max(1, -(-row_length(longest_first) // capacity))
    while True:
        for groups in (together, apart):
            rows = dealt(groups, num_rows, capacity)
            if all(len(row) <= 1 or row_length(row) <= capacity for row in rows):
                return [row for row in rows if row]
        num_rows += 1


def dealt(groups: Sequence[Row], num_rows: int, capacity: int) -> list[Row]:
    """Deals examples to rows, each to that of the one before it in its group or, without room, to the shortest."""
    rows: list[Row] = [[] for _ in range(num_rows)]
    lengths = [0] * num_rows
    for group in groups:
        index = None
        for pair in group:
            length = len(pair[1].input_ids)
            if index is None or lengths[index] + length > capacity:
                index = lengths.index(min(lengths))
            rows[index].append(pair)
            lengths[index] += length
    return rows


def row_length(row: Row) -> int:
    """Positions that a row's examples take."""
    return sum(len(example.input_ids) for _, example in row)


def count_targets(example: TokenizedExample) -> int:
    """Target tokens of an example: the first token has nothing before it to be predicted from."""
    return int(np.count_nonzero(example.is_target[1:]))


def idle(task: int) -> MicroBatch:
    """A micro-batch without a target, whose loss and gradients are zero: for a rank that only keeps others company."""
    nothing = torch.zeros(0, dtype=torch.int64)
    token_BS = torch.zeros(1, 1, dtype=torch.int64)
    return MicroBatch(token_BS, None, token_BS.bool(), nothing, nothing, (Segment(task, 0, 1),))


def stack(rows: Sequence[Row]) -> MicroBatch:
    """Builds the tensors of a micro-batch, padded on the right with token 0 at position 0."""
    shape = (len(rows), max(row_length(row) for row in rows))
    input_ids = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    keep = np.zeros(shape, dtype=np.bool_)
    labels, label_tasks, segments = [], [], []
    for index, row in enumerate(rows):
        start = 0
        for task, example in sorted(row, key=lambda pair: pair[0]):  # fewer segments
            end = start + len(example.input_ids)
            input_ids[index, start:end] = example.input_ids
            position_ids[index, start:end] = np.arange(end - start)
            keep[index, start : end - 1] = example.is_target[1:]
            labels.append(example.input_ids[1:][example.is_target[1:]])
            label_tasks.append(np.full(len(labels[-1]), task, dtype=np.int64))
            segments.append(Segment(task, index * shape[1] + start, index * shape[1] + end))
            start = end
        segments[-1] = segments[-1]._replace(stop=(index + 1) * shape[1])
    packed = max(map(len, rows)) > 1
    ends = [segment.stop for segment in segments]
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids) if packed else None,
        torch.from_numpy(keep),
        torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        torch.from_numpy(np.concatenate(label_tasks)),
        tuple(segments),
        torch.tensor([0, *ends], dtype=torch.int32) if packed and len(rows) == 1 else None,
    )
