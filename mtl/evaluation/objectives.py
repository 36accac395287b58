"""One number for how well all tasks do, from validation data: what stages, guards and searches go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from statistics import fmean

from mtl.evaluation.statistics import relative_change

OBJECTIVES = ("mean_loss_ratio", "worst_loss_ratio", "mean_score", "worst_score", "mean_change", "worst_change")


def objective_of(
    name: str,
    validation_T: Sequence[Mapping[str, float]],
    base_T: Sequence[Mapping[str, float]],
    references_T: Sequence[float | None],
) -> float:
    """The objective; higher is better.

    ``loss_ratio`` is validation loss / validation loss before training, negated; ``score`` each task's own metric;
    ``change`` that score's relative change against the task trained alone. ``mean`` is over the tasks, ``worst`` the
    task that has least. Tasks without a score count only where losses do. It is NaN where a task's value is.

    Args:
        name: One of ``OBJECTIVES``.
        validation_T: ``loss`` and, where there is one, ``score`` of each task.
        base_T: The same before training; only for ``loss_ratio``.
        references_T: Score of each task trained alone; only for ``change``, and then of each task with a score.
    """
    kind, _, what = name.partition("_")
    if what == "loss_ratio":
        values = [-now["loss"] / base["loss"] for now, base in zip(validation_T, base_T, strict=True)]
    elif what == "score":
        values = [now["score"] for now in validation_T if "score" in now]
    else:
        values = []
        for now, reference in zip(validation_T, references_T, strict=True):
            if "score" in now:
                assert reference is not None
                values.append(float(relative_change(now["score"], reference)))
    mean = fmean(values)  # NaN if one of them is
    return mean if kind == "mean" or isnan(mean) else min(values)
