"""Which row of which task comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class TaskCursors:
    """A position in each task's endless sequence of shuffled epochs.

    Epoch e of task t visits its rows in a permutation of its own, seeded by (seed, t, e). Permutations are computed
    again when needed rather than stored: the number of examples seen then is the whole state, so a resumed run goes on
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
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}  # task: (epoch, order), the one in use

    @property
    def examples_seen_T(self) -> tuple[int, ...]:
        return tuple(self._seen_T)

    @property
    def epochs_seen_T(self) -> tuple[float, ...]:
        """Passes over each task's rows so far, with fractions."""
        return tuple(seen / size for seen, size in zip(self._seen_T, self._sizes, strict=True))

    def take(self, counts_T: Sequence[int]) -> list[tuple[int, int]]:
        """The next ``counts_T[t]`` examples of each task t as (task, row), tasks ascending; moves the cursors.

        Raises:
            ValueError: If there is not one count of at least 0 for each task.
        """
        if len(counts_T) != len(self._sizes) or min(counts_T) < 0:
            raise ValueError(f"counts_T must be {len(self._sizes)} numbers of at least 0; found {list(counts_T)}.")
        return [(task, row) for task, count in enumerate(counts_T) for row in self._next_rows(task, int(count))]

    def state_dict(self) -> dict[str, Any]:
        return {"examples_seen": list(self._seen_T)}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        seen = state["examples_seen"]
        if len(seen) != len(self._sizes):
            raise ValueError(
                f"examples_seen must have {len(self._sizes)} entries, one a task; found {len(seen)}. "
                "Resume with the tasks that the checkpoint was made with."
            )
        self._seen_T = [int(count) for count in seen]

    def _next_rows(self, task: int, count: int) -> list[int]:
        rows: list[int] = []
        while len(rows) < count:
            epoch, start = divmod(self._seen_T[task], self._sizes[task])
            chunk = self._permutation(task, epoch)[start : start + count - len(rows)].tolist()
            self._seen_T[task] += len(chunk)
            rows += chunk
        return rows

    def _permutation(self, task: int, epoch: int) -> np.ndarray:
        cached = self._permutations.get(task)
        if cached is None or cached[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, task, epoch])))
            cached = self._permutations[task] = (epoch, generator.permutation(self._sizes[task]))
        return cached[1]
