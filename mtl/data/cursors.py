"""Which row of which task comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class TaskCursors:
    """A position in each task's endless sequence of shuffled epochs.

    Epoch e of task t visits its rows in a permutation of its own, seeded by (seed, t, e). Permutations are computed
    again when needed rather than stored: the number of examples seen then is the state, so a resumed run goes on
    with the same rows whatever the sizes of the tasks, and a checkpoint stays a few bytes.

    Args:
        sizes: Training rows of each task [T].
        seed: The run's seed.

    Raises:
        ValueError: If there is no task or a task has no rows.
    """

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(
                f"sizes must hold at least one row for each task; found {list(sizes)}. Remove empty tasks."
            )
        self._sizes = tuple(int(size) for size in sizes)
        self._seed = seed
        self._seen_T = [0] * len(sizes)
        self._permutations: dict[
            int, tuple[tuple[int, int | None], np.ndarray]
        ] = {}  # by task, with its (epoch, limit)
        self._limits: dict[int, int] = {}
        self._seen_limited: dict[int, int] = {}

    @property
    def examples_seen_T(self) -> tuple[int, ...]:
        return tuple(self._seen_T)

    @property
    def epochs_seen_T(self) -> tuple[float, ...]:
        """Passes over each task's rows so far, with fractions."""
        return tuple(seen / size for seen, size in zip(self._seen_T, self._sizes, strict=True))

    def size(self, task: int) -> int:
        """Rows of a task that are drawn from."""
        return self._limits.get(task, self._sizes[task])

    def limit(self, tasks: Sequence[int], number: int | None) -> None:
        """From now on draws from only ``number`` rows of each of these tasks, a seeded choice; ``None``: from all.

        Asked for the same again it goes on where it is, as a resumed run must.
        """
        limits = {} if number is None else {task: number for task in tasks if number < self._sizes[task]}
        if limits != self._limits:
            self._limits, self._seen_limited = limits, dict.fromkeys(limits, 0)

    def take(self, counts_T: Sequence[int]) -> list[tuple[int, int]]:
        """The next ``counts_T[t]`` examples of each task t as (task, row), tasks ascending; moves the cursors.

        Raises:
            ValueError: If there is not one count of at least 0 for each task.
        """
        if len(counts_T) != len(self._sizes) or min(counts_T) < 0:
            raise ValueError(f"counts_T must be {len(self._sizes)} numbers of at least 0; found {list(counts_T)}.")
        return [(task, row) for task, count in enumerate(counts_T) for row in self._next_rows(task, int(count))]

    def state_dict(self) -> dict[str, Any]:
        return {"examples_seen": list(self._seen_T), "limits": dict(self._limits), "limited": dict(self._seen_limited)}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        seen = state["examples_seen"]
        if len(seen) != len(self._sizes):
            raise ValueError(
                f"examples_seen must have {len(self._sizes)} entries, one a task; found {len(seen)}. "
                "Resume with the tasks that the checkpoint was made with."
            )
        self._seen_T = [int(count) for count in seen]
        self._limits, self._seen_limited = dict(state["limits"]), dict(state["limited"])

    def _next_rows(self, task: int, count: int) -> list[int]:
        rows: list[int] = []
        while len(rows) < count:
            limited = task in self._limits
            epoch, start = divmod(self._seen_limited[task] if limited else self._seen_T[task], self.size(task))
            chunk = self._order(task, epoch)[start : start + count - len(rows)].tolist()
            self._seen_T[task] += len(chunk)
            if limited:
                self._seen_limited[task] += len(chunk)
            rows += chunk
        return rows

    def _order(self, task: int, epoch: int) -> np.ndarray:
        limit = self._limits.get(task)
        cached = self._permutations.get(task)
        if cached is None or cached[0] != (epoch, limit):
            if limit is None:
                order = permutation([self._seed, task, epoch], self._sizes[task])
            else:
                chosen = permutation([self._seed, task, 0], self._sizes[task])[:limit]
                order = chosen[permutation([self._seed, task, epoch, limit], limit)]
            cached = self._permutations[task] = ((epoch, limit), order)
        return cached[1]


def permutation(entropy: Sequence[int], size: int) -> np.ndarray:
    """A seeded order of ``range(size)``."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(entropy)))).permutation(size)
