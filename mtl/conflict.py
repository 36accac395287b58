"""How much the tasks' gradients conflict, next to what one batch more or less of a task changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl.data.batching import Batch
from mtl.run import Run

MAX_TASKS = 64  # whose cosines fit a line of metrics.jsonl


@dataclass(frozen=True)
class Conflict:
    """Cosines of the tasks' gradients between two halves of a step's examples.

    ``cosines_KK[s, t]`` is the mean of cos(s in one half, t in the other) over both ways. All its entries are of the
    same number of examples and no two of a pair share one, so the diagonal, the cosine of a task with itself, says how
    much of the rest is noise: a task that hardly agrees with itself can't be told to disagree with another.

    Args:
        tasks: The K tasks with two examples or more in the step, by their indices in the run; at most 64, those with
            the most examples.
        cosines_KK: Symmetric, float64; NaN where a gradient is zero.
    """

    tasks: Sequence[int]
    cosines_KK: Tensor


def measure_conflict(run: Run, batch: Batch) -> Conflict | None:
    """One more forward and backward over ``batch``, of whose result the training sees nothing.

    None at a step that is not due, where nothing is shared, and where no task has two examples.
    """
    every = run.options.conflict_steps
    if every is None or (run.state.step + 1) % every or run.backward.num_shared == 0:
        return None
    halves = split_in_halves(batch)
    if halves is None:
        return None
    ones_T = torch.ones(batch.num_tasks, dtype=torch.float64)
    # Copied, since the second pass writes into the buffer of the first.
    rows_KN = [run.backward(half, ones_T, step=run.state.step, apart=True).shared_RN.clone() for half in halves]
    tasks = [int(task) for task in np.flatnonzero(halves[0].counts_T)]
    return Conflict(tasks, cosines_between_halves(run.backward.gramian(torch.cat(rows_KN))))


def split_in_halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """Every other example of each task with at least two; the last of an odd number is left out."""
    counts_T = batch.counts_T
    ranked = sorted((task for task in range(batch.num_tasks) if counts_T[task] >= 2), key=lambda task: -counts_T[task])
    if not ranked:
        return None
    first, second = [], []
    for task in sorted(ranked[:MAX_TASKS]):
        own = [pair for pair in batch.examples if pair[0] == task]
        even = len(own) // 2 * 2
        first += own[0:even:2]
        second += own[1:even:2]
    return Batch(first, batch.num_tasks), Batch(second, batch.num_tasks)


def cosines_between_halves(gramian_RR: Tensor) -> Tensor:
    """[K, K] out of the Gramian of the K rows of one half followed by those of the other."""
    norms_R = gramian_RR.diagonal().clamp(min=0).sqrt()
    cosines_RR = gramian_RR / (norms_R[:, None] * norms_R[None, :])
    size = len(gramian_RR) // 2
    across_KK = cosines_RR[:size, size:]
    return (across_KK + across_KK.T) / 2
