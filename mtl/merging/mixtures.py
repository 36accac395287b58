"""Which mixture of several points is best, found with few evaluations.

A mixture has weights on the simplex of P points (branches, and the start they share). Each task's own parameters have
weights of their own: they act on no other task, so one evaluation tells of a choice for each of them.

Source: Jiang et al., "ForkMerge: Mitigating Negative Transfer in Auxiliary-Task Learning", NeurIPS 2023: the points
are ranked, and from the best on each next one gets the best of ``alpha * (mean weight so far)``, alpha in 0.2 .. 1,
renormalised. Here that is followed by finer moves, and every mixture ever tried competes.

Shape suffixes: T tasks, P points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from mtl.evaluation.results import TaskEvaluation

Weights = tuple[Fraction, ...]  # [P], exact: equal mixtures are equal keys

ALPHAS = tuple(Fraction(i, 5) for i in range(1, 6))
FINER = (Fraction(1, 4), Fraction(1, 8))


class Spent(Exception):
    """All evaluations have been had."""


@dataclass(frozen=True)
class Mixture:
    """Weights of the shared parameters, and of each task's own; empty where there are no such parameters."""

    shared: Weights
    private_T: tuple[Weights, ...]


def corner(point: int, num_points: int) -> Weights:
    """All weight on one point."""
    return tuple(Fraction(int(place == point)) for place in range(num_points))


def mean_of(points: Sequence[int], num_points: int) -> Weights:
    """The same weight on each of these."""
    return tuple(Fraction(int(place in points), len(points)) for place in range(num_points))


def towards(weights: Weights, point: int, share: Fraction) -> Weights:
    """``weights + share (corner - weights)``."""
    return tuple((1 - share) * weight + share * (place == point) for place, weight in enumerate(weights))


class Search:
    """Looks for the mixture of the highest objective. Deterministic; of equals the first one found stays.

    Args:
        num_points: P; the first ones are the branches.
        num_branches: How many of them are.
        num_tasks: T.
        has_shared: Whether there are parameters that several tasks train.
        has_private: Whether there are parameters of one task.
        evaluate: Validates a mixture, each task by itself; raises :class:`Spent` when there is no more to be had.
        objective: Of all tasks' evaluations; higher is better.
        task_value: The same of one task; the objective rises in each task's.
    """

    best: Mixture | None = None
    validation: Sequence[TaskEvaluation] = ()
    value: float = -math.inf

    def __init__(
        self,
        *,
        num_points: int,
        num_branches: int,
        num_tasks: int,
        has_shared: bool,
        has_private: bool,
        evaluate: Callable[[Mixture], Sequence[TaskEvaluation]],
        objective: Callable[[Sequence[TaskEvaluation]], float],
        task_value: Callable[[int, TaskEvaluation], float],
    ) -> None:
        self.num_points = num_points
        self.num_branches = num_branches
        self.num_tasks = num_tasks
        self.has_shared = has_shared
        self.has_private = has_private
        self.evaluate = evaluate
        self.objective = objective
        self.task_value = task_value
        self.values_P: list[float] = []  # of the points themselves
        self.values_TP: list[list[float]] = [[] for _ in range(num_tasks)]

    def run(self) -> None:
        """Tries mixtures until nothing helps or the evaluations are spent."""
        try:
            self._points()
            if self.best is None:
                return
            if self.has_shared:
                self._greedy()
            if self.has_private:
                self._greedy_private()
            for share in FINER:
                while self._finer(share):
                    pass
        except Spent:
            pass

    def pure(self, weights: Weights) -> Mixture:
        """These weights for everything."""
        return Mixture(weights if self.has_shared else (), (weights,) * self.num_tasks if self.has_private else ())

    def _points(self) -> None:
        for point in range(self.num_points):
            validation, value = self._try(self.pure(corner(point, self.num_points)))
            self.values_P.append(value)
            for task, item in enumerate(validation):
                self.values_TP[task].append(self.task_value(task, item))
        self._try(self.pure(mean_of(range(self.num_branches), self.num_points)))

    def _greedy(self) -> None:
        """ForkMerge's search: from the best point on, as much of each next one as helps."""
        rank = _descending(self.values_P)
        mixture, value = self.pure(corner(rank[0], self.num_points)), self.values_P[rank[0]]
        for place in range(1, self.num_points):
            start = mixture
            for alpha in ALPHAS:
                tried = moved(start, rank[place], alpha / (place + alpha))
                _, tried_value = self._try(tried)
                if tried_value > value:
                    mixture, value = tried, tried_value

    def _greedy_private(self) -> None:
        """The same for each task's own parameters, under the best shared ones; in each task's own order of points."""
        for point in range(self.num_points):
            self._try_private([corner(point, self.num_points)] * self.num_tasks)
        rank_T = [_descending(values) for values in self.values_TP]
        for place in range(1, self.num_points):
            start_T = self._best().private_T
            for alpha in ALPHAS:
                share = alpha / (place + alpha)
                self._try_private([towards(own, rank_T[task][place], share) for task, own in enumerate(start_T)])

    def _finer(self, share: Fraction) -> bool:
        """Moves towards each point; says whether any has helped."""
        before = self._best()
        for point in range(self.num_points):
            if self.has_shared:
                self._try(moved(self._best(), point, share))
            if self.has_private:
                self._try_private([towards(own, point, share) for own in self._best().private_T])
        return self._best() != before

    def _best(self) -> Mixture:
        assert self.best is not None
        return self.best

    def _try(self, mixture: Mixture) -> tuple[Sequence[TaskEvaluation], float]:
        """Takes the mixture if all tasks together are better with it."""
        validation = self.evaluate(mixture)
        value = self.objective(validation)
        if value > self.value:
            self.best, self.validation, self.value = mixture, validation, value
        return validation, value

    def _try_private(self, private_T: Sequence[Weights]) -> None:
        """Takes the weights of the own parameters of each task that is better with them."""
        best = self._best()
        found = self.evaluate(replace(best, private_T=tuple(private_T)))
        better_T = [
            _key(self.task_value(task, item), item) > _key(self.task_value(task, now), now)
            for task, (item, now) in enumerate(zip(found, self.validation, strict=True))
        ]
        self.best = replace(
            best,
            private_T=tuple(
                new if better else own for new, own, better in zip(private_T, best.private_T, better_T, strict=True)
            ),
        )
        self.validation = [
            item if better else now for item, now, better in zip(found, self.validation, better_T, strict=True)
        ]
        self.value = self.objective(self.validation)


def moved(mixture: Mixture, point: int, share: Fraction) -> Mixture:
    """All of it towards a point."""
    return Mixture(
        towards(mixture.shared, point, share), tuple(towards(own, point, share) for own in mixture.private_T)
    )


def _key(value: float, evaluation: TaskEvaluation) -> tuple[float, float]:
    return value, -evaluation.loss  # scores are often equal


def _descending(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda place: -values[place])
