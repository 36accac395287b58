"""Everything a comparison of runs finds, as plain data: what the table, the page and the files show.

A *strategy* here is all runs that differ in nothing but their seed. Scores are test scores in [0, 1], higher is better;
losses are nats per target token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtl.report.runs import FinishedRun
from mtl.reporting.results import Cost


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; ``low`` and ``high`` are NaN where there can be none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskOutcome:
    """One strategy on one task.

    Args:
        score: Test score, mean over the seeds.
        per_seed: The score of each seed.
        loss: Test loss, mean over the seeds [nats per target token].
        change: Relative change of the score against the reference; None without one.
        difference: Absolute change of the score against the reference; None without one.
        p_adjusted: Two-sided p of that difference by the paired bootstrap, adjusted by Holm over the strategy's tasks.
        epochs_seen: Of the task's training set, mean over the seeds.
        examples_seen: Of the task, mean over the seeds.
    """

    score: Interval
    per_seed: Mapping[int, float]
    loss: float
    change: Interval | None
    difference: Interval | None
    p_adjusted: float | None
    epochs_seen: float
    examples_seen: float

    @property
    def hurt(self) -> bool:
        """Whether the whole interval of the change lies below 0."""
        return self.change is not None and self.change.high < 0


@dataclass(frozen=True)
class StrategyOutcome:
    """One strategy on all tasks.

    Args:
        name: Short and telling, such as ``pcgrad``.
        runs: One a seed, by seed.
        tasks: By the tasks' names.
        mean: Mean over the tasks of the relative change, or of the score where there is no reference.
        worst: The lowest of these.
        worst_task: Whose that is.
        per_seed_mean: ``mean`` of each seed.
        mean_rank: Over the tasks, among the strategies; 1 is best, ties share their mean rank.
        cost: Mean over the seeds.
        on_pareto_front: Whether no other strategy has a higher mean and at least as good a worst task, or the reverse.
    """

    name: str
    runs: Sequence[FinishedRun]
    tasks: Mapping[str, TaskOutcome]
    mean: Interval
    worst: Interval
    worst_task: str
    per_seed_mean: Mapping[int, float]
    mean_rank: float
    cost: Cost
    on_pareto_front: bool

    @property
    def num_hurt(self) -> int:
        """Tasks whose change lies below 0 with its whole interval."""
        return sum(task.hurt for task in self.tasks.values())

    @property
    def num_below(self) -> int:
        """Tasks whose change is below 0, certain or not."""
        return sum(task.change is not None and task.change.value < 0 for task in self.tasks.values())


@dataclass(frozen=True)
class Duel:
    """The best strategy by an aggregate against another.

    Args:
        other: Its name.
        difference: Best minus other, of the aggregate, paired by example and seed.
        p_adjusted: Two-sided p by the bootstrap, adjusted by Holm over the others.
        sign_flip_p: Exact two-sided p of the paired sign-flip test over the seeds that both have; None below 2.
        num_seeds: Of these seeds.
    """

    other: str
    difference: Interval
    p_adjusted: float
    sign_flip_p: float | None
    num_seeds: int

    @property
    def decided(self) -> bool:
        """Whether the data tell the two apart."""
        return self.difference.low > 0 and self.p_adjusted < 0.05


@dataclass(frozen=True)
class Verdict:
    """Which strategy is best by an aggregate, ``mean`` or ``worst``, and which others might be as good."""

    aggregate: str
    best: str
    duels: Sequence[Duel]


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Args:
        tasks: Names, in the runs' order.
        metrics: Each task's metric; ``loss`` where a task has none (lower is better, and changes are negated).
        base: Each task's score before training.
        reference: Each task's score of the single-task runs; empty without a reference.
        reference_name: What they are called, such as ``single_task``; None without a reference.
        strategies: Best mean first.
        verdicts: For the mean and for the worst task; empty with a single strategy.
        notes: What a reader must know: runs left out and why, what is missing, what few seeds can't show.
        failures: Jobs that ended with an error: name and error.
    """

    tasks: Sequence[str]
    metrics: Mapping[str, str]
    base: Mapping[str, float]
    reference: Mapping[str, float]
    reference_name: str | None
    strategies: Sequence[StrategyOutcome]
    verdicts: Sequence[Verdict]
    notes: Sequence[str]
    failures: Mapping[str, str]
