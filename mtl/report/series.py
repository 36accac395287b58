"""What happened over the steps of runs: curves thinned for drawing, and how much the tasks' gradients conflict.

Shape suffixes: K tasks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import nan, sqrt
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mtl.errors import UserError

MAX_POINTS = 200  # of a curve and of the measurements of conflict; a chart has no more pixels for one

# Of a line that is not parsed; a task may be called like a key, which then has a number.
EVALUATION, CONFLICT = re.compile(rb'"eval": ?\{'), re.compile(rb'"conflict": ?\{')

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Values over ascending steps; NaN where a value was not finite."""

    steps: Floats
    values: Floats


@dataclass
class Moments:
    """Count, sum and sum of squares of measurements, which add up over runs."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, other: Moments) -> None:
        """Takes those of ``other`` in."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        """NaN without a measurement."""
        return self.total / self.count if self.count else nan

    @property
    def standard_error(self) -> float:
        """Of the mean, as if the measurements were independent; NaN below two."""
        if self.count < 2:
            return nan
        variance = max(0.0, self.squares - self.total * self.mean) / (self.count - 1)
        return sqrt(variance / self.count)


@dataclass(frozen=True)
class Conflict:
    """Cosines of the tasks' gradients between two halves of a step, over all measurements.

    The diagonal is a task with itself: how much of a cosine the noise of a half batch leaves.

    Args:
        tasks: K of them.
        means_KK: NaN where a pair was never measured.
        standard_errors_KK: Of the means; NaN below two measurements.
        counts_KK: Measurements.
    """

    tasks: Sequence[str]
    means_KK: Floats
    standard_errors_KK: Floats
    counts_KK: NDArray[np.int64]


@dataclass
class Series:
    """Of a run, or of a strategy as the mean over its seeds; all by the tasks' names.

    Args:
        losses: Validation loss [nats per target token] at every evaluation.
        scores: The task's metric at every evaluation that had it.
        probabilities: The sampler's ``p``.
        weights: The loss weights ``lambda``.
        coefficients: The surgery's ``w`` times the M tasks in the step, at the steps that the task was in: 1 in a plain
            mean.
        cosines: Of pairs of tasks; see :class:`Conflict`.
    """

    losses: dict[str, Curve] = field(default_factory=dict)
    scores: dict[str, Curve] = field(default_factory=dict)
    probabilities: dict[str, Curve] = field(default_factory=dict)
    weights: dict[str, Curve] = field(default_factory=dict)
    coefficients: dict[str, Curve] = field(default_factory=dict)
    cosines: dict[tuple[str, str], Moments] = field(default_factory=dict)

    def conflict(self, tasks: Sequence[str]) -> Conflict:
        """The cosines of these tasks as matrices."""
        grid = [[self.cosines.get((first, second), Moments()) for second in tasks] for first in tasks]
        return Conflict(
            tasks,
            np.array([[cell.mean for cell in row] for row in grid]),
            np.array([[cell.standard_error for cell in row] for row in grid]),
            np.array([[cell.count for cell in row] for row in grid]),
        )


def read_series(path: Path, metrics: Mapping[str, str]) -> Series:
    """One run's ``metrics.jsonl``: all evaluations, and at most 200 steps and measurements of conflict, evenly spread.

    Only the lines kept are parsed. A last line that a crash tore is left out.

    Args:
        path: The file.
        metrics: Each task's metric.

    Raises:
        UserError: The file is missing, or a line kept is no JSON object or no record of a run.
    """
    evaluations, steps, conflicts = _read_records(path)
    try:
        return Series(
            losses=_curves(evaluations, lambda record: {name: own.get("loss") for name, own in record["eval"].items()}),
            scores=_curves(evaluations, lambda record: _scores(record["eval"], metrics)),
            probabilities=_curves(steps, lambda record: record["p"]),
            weights=_curves(steps, lambda record: record.get("lambda") or {}),
            coefficients=_curves(steps, lambda record: _scaled(record.get("w") or {})),
            cosines=_cosines(conflicts),
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: must hold the records of a run, found: {error!r}; there are no curves.") from error


def mean_series(runs: Sequence[Series]) -> Series:
    """Of a strategy's runs: curves averaged by :func:`mean_curve`, measurements of conflict put together."""
    cosines: dict[tuple[str, str], Moments] = {}
    for run in runs:
        for pair, moments in run.cosines.items():
            cosines.setdefault(pair, Moments()).add(moments)
    return Series(
        losses=_mean_curves([run.losses for run in runs]),
        scores=_mean_curves([run.scores for run in runs]),
        probabilities=_mean_curves([run.probabilities for run in runs]),
        weights=_mean_curves([run.weights for run in runs]),
        coefficients=_mean_curves([run.coefficients for run in runs]),
        cosines=cosines,
    )


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at every step that any curve has, within the steps that all of them reach.

    Between its own steps a curve is interpolated linearly, so that equal steps are averaged as they are. It ends with
    the shortest curve: a mean over fewer seeds would jump. NaN in one is NaN in the mean.
    """
    if len(curves) == 1:
        return curves[0]
    first, last = max(curve.steps[0] for curve in curves), min(curve.steps[-1] for curve in curves)
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    steps = steps[(steps >= first) & (steps <= last)]
    return Curve(steps, np.mean([np.interp(steps, curve.steps, curve.values) for curve in curves], axis=0))


def _mean_curves(runs: Sequence[Mapping[str, Curve]]) -> dict[str, Curve]:
    """A task's curve is averaged over the runs that have one."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: mean_curve([run[name] for run in runs if name in run]) for name in names}


def _scores(evaluation: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: own[metrics[name]]
        for name, own in evaluation.items()
        if metrics.get(name, "loss") != "loss" and metrics[name] in own
    }


def _scaled(coefficients: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if w is None else w * len(coefficients) for name, w in coefficients.items()}


def _curves(
    records: Sequence[dict[str, Any]], values: Callable[[dict[str, Any]], Mapping[str, Any]]
) -> dict[str, Curve]:
    """Each task's values over the records that have one of it; null is NaN."""
    points: dict[str, dict[int, float]] = {}  # of two evaluations at one step, the later counts
    for record in records:
        for name, value in values(record).items():
            points.setdefault(name, {})[record["step"]] = nan if value is None else value
    return {
        name: Curve(*np.array(sorted(own.items(), key=lambda point: point[0]), dtype=np.float64).T)
        for name, own in points.items()
    }


def _cosines(records: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Moments]:
    found: dict[tuple[str, str], Moments] = {}
    for record in records:
        names, rows = record["conflict"]["tasks"], record["conflict"]["cosines"]
        for (first, row), (column, second) in product(zip(names, rows, strict=True), enumerate(names)):
            if row[column] is not None:
                found.setdefault((first, second), Moments()).add(Moments(1, row[column], row[column] ** 2))
    return found


def _read_records(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """All evaluations, the steps kept, and the measurements of conflict kept."""
    evaluations: list[tuple[int, int]] = []  # number of the line and where it starts
    steps: list[tuple[int, int]] = []
    conflicts: list[tuple[int, int]] = []
    try:
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                (evaluations if EVALUATION.search(line) else steps).append((number, start))
                if CONFLICT.search(line):
                    conflicts.append((number, start))
                start += len(line)
            wanted = {*evaluations, *_thinned(steps), *_thinned(conflicts)}
            records = {place: _record(path, file, *place) for place in sorted(wanted)}
    except OSError as error:
        raise UserError(f"{path}: must be a readable file, found: {error.strerror}; there are no curves.") from None
    return (
        [records[place] for place in evaluations if "eval" in records[place]],
        [records[place] for place in _thinned(steps) if "p" in records[place]],
        [records[place] for place in _thinned(conflicts) if "conflict" in records[place]],
    )


def _record(path: Path, file: BinaryIO, number: int, start: int) -> dict[str, Any]:
    file.seek(start)
    line = file.readline()
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        found = line[:60].decode("utf-8", "replace").strip()
        raise UserError(f"{path}:{number}: a line must be one JSON object, found {found!r}; delete the line.")
    return record


def _thinned(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """At most 200 of them, evenly spread, the first and the last included."""
    kept = np.linspace(0, len(places) - 1, min(len(places), MAX_POINTS)).round().astype(int)
    return [places[index] for index in kept]
