"""No harm: a stage that trains some tasks must not make the others worse.

A task is harmed if its score on validation data has fallen by more than ``allowed_drop`` since the stage began, and the
fall is more than noise: in a paired bootstrap over the examples (:mod:`mtl.evaluation.statistics`) it is above 0 with
``guard_confidence``. Where there is only a loss, its relative rise takes the place of the fall.

While a stage goes on, an evaluation at which a task is harmed is never its best. At its end ``rollback`` puts the
parameters back that the stage began with, and ``interpolate`` looks for the best of

    theta(s) = theta_start + s (theta_end - theta_start),   s in 3/4, 1/2, 1/4, 1/8, 0

at which no task is harmed. A LoRA's A and B are interpolated as they are: the two ends are points of one training, and
whatever lies between is validated before it is taken.

Source: the validated interpolation of Jiang et al., "ForkMerge", NeurIPS 2023, with one branch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.evaluation.resampling import resampled_scores, sufficient_statistics
from mtl.evaluation.results import TaskEvaluation
from mtl.evaluation.statistics import resample_examples
from mtl.run import Run, StageParts, summaries
from mtl.stages import Stage

SCALES = (0.75, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Fall:
    """How far a task fell from one evaluation to another; below 0 it rose.

    Args:
        drop: Of its score, or relative rise of its loss.
        surely: What the drop exceeds with the confidence asked for.
    """

    drop: float
    surely: float

    def harms(self, allowed: float) -> bool:
        """Whether it is more than is allowed, and more than noise."""
        return self.drop > allowed and self.surely > 0


def fall(before: TaskEvaluation, after: TaskEvaluation, *, confidence: float | None, seed: int) -> Fall:
    """From ``before`` to ``after``, two evaluations of a task on the same examples.

    Args:
        confidence: Of the lower bound ``surely``, one-sided; ``None``: the drop itself.
        seed: Of the resamples.
    """
    only_loss = before.metric is None
    drop = after.loss / before.loss - 1 if only_loss else _score(before) - _score(after)
    if confidence is None:
        return Fall(drop, drop)
    if before.num_examples == 1:  # which tells nothing of others
        return Fall(drop, -math.inf)
    counts_RN = resample_examples(before.num_examples, np.random.default_rng(seed))
    drops_R = (_loss_rises if only_loss else _score_drops)(counts_RN, before, after)
    return Fall(drop, float(np.quantile(drops_R, 1 - confidence, method="weibull")))


def _score(evaluation: TaskEvaluation) -> float:
    assert evaluation.score is not None
    return evaluation.score


def _score_drops(counts_RN: NDArray[np.int64], before: TaskEvaluation, after: TaskEvaluation) -> NDArray[np.float64]:
    """The drop of the score in every resample [R]."""
    assert before.metric is not None
    statistics = [
        sufficient_statistics(
            before.metric,
            [row.answer for row in item.predictions],
            [row.reference for row in item.predictions],
            [row.score for row in item.predictions],
        )
        for item in (before, after)
    ]
    scores_RA = resampled_scores(counts_RN, statistics)
    return np.asarray(scores_RA[:, 0] - scores_RA[:, 1])


def _loss_rises(counts_RN: NDArray[np.int64], before: TaskEvaluation, after: TaskEvaluation) -> NDArray[np.float64]:
    """The relative rise of the loss in every resample [R]: both have the same target tokens, which cancel."""
    before_R, after_R = (counts_RN @ np.asarray(item.losses, dtype=np.float64) for item in (before, after))
    return np.asarray(after_R / before_R - 1)


def falls(
    stage: Stage, others: Sequence[int], before: Sequence[TaskEvaluation], after: Sequence[TaskEvaluation], seed: int
) -> dict[int, Fall]:
    """Of each of the ``others``."""
    return {task: fall(before[task], after[task], confidence=stage.guard_confidence, seed=seed) for task in others}


def harmed(stage: Stage, fallen: Mapping[int, Fall]) -> list[int]:
    """The tasks that have fallen too far."""
    return [task for task, item in fallen.items() if item.harms(stage.allowed_drop)]


def others_of(run: Run, parts: StageParts) -> list[int]:
    """The tasks that the stage is not for; those that it replays are among them."""
    return [task for task in range(len(run.data)) if task not in parts.focus]


def falls_now(run: Run, parts: StageParts) -> dict[int, Fall]:
    """Of the other tasks since the stage began, by the newest validation."""
    assert run.validation is not None
    return falls(parts.stage, others_of(run, parts), start_validation(run), run.validation, run.options.seed)


def start_validation(run: Run) -> Sequence[TaskEvaluation]:
    """The evaluation of the parameters that the stage began with; made again after an interruption."""
    if run.start_validation is None:
        assert run.start_parameters is not None
        newest = run.validation
        with trying(run, run.start_parameters):
            run.start_validation = run.evaluate_validation()
        run.validation = newest
    return run.start_validation


@contextmanager
def trying(run: Run, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts parameters in until the block ends, whichever way."""
    before = copied(run, list(parameters))
    put(run, parameters)
    try:
        yield
    finally:
        put(run, before)


def copied(run: Run, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Copies of the trainable parameters, or of some."""
    named = run.layout.named_parameters()
    return {name: named[name].detach().clone() for name in (named if names is None else names)}


@torch.no_grad()
def put(run: Run, parameters: Mapping[str, Tensor]) -> None:
    """Puts these values into the parameters of their names."""
    named = run.layout.named_parameters()
    for name, value in parameters.items():
        named[name].copy_(value)


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """``start + scale (end - start)``."""
    return {name: torch.lerp(start[name], end[name], scale) for name in start}


def guard_stage(run: Run, parts: StageParts) -> dict[str, object]:
    """Undoes as much of the stage as harms another task; returns what was found and done, for the record.

    ``run.validation`` is that of the parameters as they are, before and after.
    """
    stage, names = parts.stage, run.names
    fallen = falls_now(run, parts)
    bad = harmed(stage, fallen)
    report: dict[str, object] = {
        "harmed": {names[task]: fallen[task].drop for task in bad},
        "drops": {names[task]: item.drop for task, item in fallen.items()},
        "scale": 1.0,
    }
    if not bad:
        return report
    assert run.start_parameters is not None
    start, end = run.start_parameters, copied(run)
    best_scale, best_validation = 0.0, start_validation(run)
    best_value = run.objective(summaries(best_validation))
    for scale in SCALES if stage.guard == "interpolate" else ():
        with trying(run, between(start, end, scale)):
            validation = run.evaluate_validation()
        found = falls(stage, others_of(run, parts), start_validation(run), validation, run.options.seed)
        value = run.objective(summaries(validation))
        if not harmed(stage, found) and value > best_value:
            best_scale, best_validation, best_value, fallen = scale, validation, value, found
    put(run, start if best_scale == 0 else between(start, end, best_scale))
    run.keep_validation(best_validation)
    report["scale"] = best_scale
    report["drops"] = {names[task]: item.drop if best_scale else 0.0 for task, item in fallen.items()}
    return report
