"""The evidence put together: scores and changes over any seeds of a strategy, as they are and resampled.

Shape suffixes: R resamples, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from numpy.typing import NDArray

from mtl.evaluation.resampling import higher_is_better
from mtl.evaluation.statistics import mean_over_seeds, relative_change, resample_seeds
from mtl.report.evidence import TaskEvidence

Floats = NDArray[np.float64]
SEED = 0  # of the resamples: the same runs give the same report


@dataclass(frozen=True)
class Reference:
    """What changes are relative to: each task's runs, as places in the list of all; none for the base model."""

    name: str
    places: Mapping[str, Sequence[int]]


class Pool:
    """Every run's scores, with the reference's.

    Args:
        tasks: All runs on each task.
        reference: What changes are relative to; None for values that are scores.
        base: Each task's score before training, the reference where it has no runs.
        seeds: Of each run, by its place.
    """

    def __init__(
        self,
        tasks: Sequence[TaskEvidence],
        reference: Reference | None,
        base: Mapping[str, float],
        seeds: Sequence[int],
    ) -> None:
        self.tasks = tasks
        self.reference = reference
        self.base = base
        self._run_seeds = seeds

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.tasks)

    def reference_score(self, index: int) -> float:
        """Mean score of the reference's runs of a task; NaN without a reference."""
        task = self.tasks[index]
        if self.reference is None:
            return nan
        places = self.reference.places.get(task.name)
        return float(task.scores[list(places)].mean()) if places else self.base[task.name]

    def value(self, index: int, places: Sequence[int]) -> float:
        """Relative change of the mean score of these runs in a task, as a fraction; without a reference the score."""
        task = self.tasks[index]
        score = float(task.scores[list(places)].mean())
        if self.reference is None:
            return score
        return float(relative_change(score, self.reference_score(index), higher_is_better(task.metric)))

    def resampled_value(self, index: int, places: Sequence[int], seeds: Sequence[int]) -> Floats:
        """The same for every resample of examples and of the runs' seeds [R]; NaN where examples are not known."""
        scores_R = self.resampled_score(index, places, seeds)
        if self.reference is None:
            return scores_R
        return relative_change(scores_R, self.resampled_reference(index), higher_is_better(self.tasks[index].metric))

    def resampled_score(self, index: int, places: Sequence[int], seeds: Sequence[int]) -> Floats:
        """Mean score over resampled seeds [R]; runs of equal seeds are resampled together, of whatever strategy."""
        return mean_over_seeds(self.tasks[index].resampled_RA[:, list(places)], _seed_counts(seeds))

    def resampled_reference(self, index: int) -> Floats:
        """The reference's score for every resample [R]."""
        assert self.reference is not None
        task = self.tasks[index]
        places = self.reference.places.get(task.name)
        if not places:  # the base model's answers are not kept
            return np.full(len(task.resampled_RA), self.base[task.name])
        return self.resampled_score(index, places, [self._run_seeds[place] for place in places])


class StrategyRuns:
    """The runs of a strategy within the evidence: its values over tasks, as they are and resampled.

    A value is a task's relative change against the reference, or its score where there is none.

    Args:
        name: Of the strategy.
        places: Its runs in the pool, by seed, in the order of the seeds.
        pool: All runs.
    """

    def __init__(self, name: str, places: Mapping[int, int], pool: Pool) -> None:
        self.name = name
        self.places = places
        self._pool = pool

    def values_T(self, seeds: Sequence[int]) -> Floats:
        """Values over these seeds together [T]."""
        return np.array([self._pool.value(index, self._places(seeds)) for index in range(self._pool.num_tasks)])

    def resampled_RT(self, seeds: Sequence[int]) -> Floats:
        """The same for every resample of examples and of these seeds [R, T]."""
        columns = [
            self._pool.resampled_value(index, self._places(seeds), seeds) for index in range(self._pool.num_tasks)
        ]
        return np.stack(columns, axis=1)

    def _places(self, seeds: Sequence[int]) -> list[int]:
        return [self.places[seed] for seed in seeds]


def _seed_counts(seeds: Sequence[int]) -> NDArray[np.int64]:
    """Drawn anew for a set of seeds and always alike, so that what shares its seeds shares its resamples."""
    return resample_seeds(len(seeds), np.random.default_rng([SEED, *seeds]))
