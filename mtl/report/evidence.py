"""What a comparison rests on: every run's score on every task, and the same over resampled test examples.

Shape suffixes: N examples, R resamples, S seeds of a strategy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mtl.errors import UserError
from mtl.evaluation.resampling import SufficientStatistics, resampled_scores, sufficient_statistics
from mtl.evaluation.statistics import NUM_RESAMPLES, resample_examples
from mtl.report.runs import FinishedRun

if TYPE_CHECKING:
    from mtl.evaluation.results import Prediction

Floats = NDArray[np.float64]
LOSS = "loss"
ROUNDING = 0.02  # of a loss in bfloat16, relative


@dataclass
class TaskEvidence:
    """All runs on one task.

    Args:
        name: Of the task.
        metric: Its metric; ``loss`` where it has none.
        scores: Each run's test score, by the run's place.
        resampled_RA: The scores over the same resamples of the test examples for every run [R, A]; NaN where the
            examples are not known one by one.
    """

    name: str
    metric: str
    scores: Floats
    resampled_RA: Floats


@dataclass
class _TestSet:
    """The examples that a task was tested on, as the first run has them."""

    run: FinishedRun
    digest: str
    statistics: list[SufficientStatistics | None] = field(default_factory=list)


def gather_evidence(runs: Sequence[FinishedRun], tasks: Sequence[str], *, seed: int = 0) -> list[TaskEvidence]:
    """The evidence of runs that can be compared; a run that lacks a task has NaN there.

    Args:
        runs: All runs, references included.
        tasks: The tasks to compare on.
        seed: Of the resamples; each task draws its own.

    Raises:
        UserError: Two runs have another metric or other test examples of a task: their scores can't be compared.
    """
    evidence = []
    for index, name in enumerate(tasks):
        own = [run for run in runs if name in run.results.tasks]
        metric = _same_metric(own, name)
        test_set: _TestSet | None = None
        statistics: dict[int, SufficientStatistics] = {}
        for place, run in enumerate(runs):
            if name not in run.results.tasks:
                continue
            predictions = _predictions(run, name) if metric != LOSS else []
            digest = _digest(predictions) if predictions else str(run.results.tasks[name].test["num_examples"])
            test_set = test_set or _TestSet(run, digest)
            alike = predictions or _alike_before(run, test_set.run, name)
            if digest != test_set.digest or not alike:
                raise UserError(
                    f"{run.folder} and {test_set.run.folder}: must have the same test examples of {name}, and have "
                    "others. Compare runs with the same data and max_test_examples."
                )
            if predictions:
                statistics[place] = _statistics(metric, predictions)
        rng = np.random.default_rng([seed, index])
        evidence.append(_task_evidence(name, metric, runs, statistics, rng))
    return evidence


def _predictions(run: FinishedRun, name: str) -> list[Prediction]:
    predictions, expected = run.predictions(name), run.results.tasks[name].test["num_examples"]
    if len(predictions) != expected:
        raise UserError(
            f"{run.folder}: must have predictions of all {expected} test examples of {name}, and has "
            f"{len(predictions)}; run the training again, or leave it out."
        )
    return predictions


def _alike_before(first: FinishedRun, second: FinishedRun, name: str) -> bool:
    """Whether one model had the same loss before training, to rounding, as it must have on the same examples."""
    before, other = (run.results.tasks[name].base["loss"] for run in (first, second))
    if before is None or other is None or first.results.model != second.results.model:
        return True
    return abs(before - other) <= ROUNDING * max(abs(before), abs(other))


def _task_evidence(
    name: str,
    metric: str,
    runs: Sequence[FinishedRun],
    statistics: dict[int, SufficientStatistics],
    rng: np.random.Generator,
) -> TaskEvidence:
    scores = np.array([run_score(run, name, metric) for run in runs])
    resampled_RA = np.full((NUM_RESAMPLES, len(runs)), nan)
    if statistics:
        num_examples = len(next(iter(statistics.values())).values_NK)
        counts_RN = resample_examples(num_examples, rng)
        resampled_RA[:, list(statistics)] = resampled_scores(counts_RN, list(statistics.values()))
    return TaskEvidence(name, metric, scores, resampled_RA)


def run_score(run: FinishedRun, name: str, metric: str) -> float:
    """The run's test score of a task; NaN if it has none."""
    task = run.results.tasks.get(name)
    score = None if task is None else task.test[metric]
    return nan if score is None else score


def _same_metric(runs: Sequence[FinishedRun], name: str) -> str:
    metrics = {run.results.tasks[name].metric or LOSS: run for run in runs}
    if len(metrics) > 1:
        (first, one), (second, other), *_ = metrics.items()
        raise UserError(
            f"{one.folder} and {other.folder}: must have the same metric of {name}, and have {first} and {second}. "
            "Compare runs with the same tasks."
        )
    return next(iter(metrics))


def _statistics(metric: str, predictions: Sequence[Prediction]) -> SufficientStatistics:
    return sufficient_statistics(
        metric,
        [item.answer for item in predictions],
        [item.reference for item in predictions],
        [item.score for item in predictions],
    )


def _digest(predictions: Iterable[Prediction]) -> str:
    digest = hashlib.sha256()
    for item in predictions:
        lengths = f"{len(item.prompt)} {len(item.reference)} "  # which tell where one text ends
        digest.update((lengths + item.prompt + item.reference).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
