"""What a search over strategies maximises: one number a run, from validation data only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import isnan, nan
from pathlib import Path
from statistics import fmean

from mtl.errors import UserError
from mtl.report.runs import find_runs
from mtl.report.statistics import relative_change
from mtl.reporting.json_files import read_json_lines
from mtl.reporting.results import Results, read_results

OBJECTIVES = ("mean_loss_ratio", "worst_loss_ratio", "mean_score", "worst_score", "mean_change", "worst_change")


def check_reference(reference: str, tasks: Iterable[str]) -> None:
    """Refuses a reference that lacks a task, before anything is trained.

    Raises:
        UserError: It holds no run of one of these tasks, or one without validation scores.
    """
    own = reference_scores(reference)
    missing = [task for task in tasks if task not in own]
    if missing:
        raise UserError(f"sweep.reference={reference}: must have a run of each task, and has none of {missing[0]}.")


def objective(folder: Path, name: str, reference: str | None) -> float:
    """The objective of a finished run; higher is better, NaN where a loss is not finite.

    ``loss_ratio`` is validation loss / validation loss before training, negated; ``score`` each task's own metric;
    ``change`` that score's relative change against single-task runs. ``mean`` is over the tasks, ``worst`` the task
    that has least.

    Args:
        folder: Of the run.
        name: One of ``OBJECTIVES``.
        reference: Folder of the single-task runs, for ``change``.

    Raises:
        UserError: The run has no validation scores, or the reference lacks a task.
    """
    kind, _, what = name.partition("_")
    values = _loss_ratios(folder) if what == "loss_ratio" else scores(read_results(folder / "results.json"), folder)
    if what == "change":
        assert reference is not None
        check_reference(reference, values)
        own = reference_scores(reference)
        values = {task: float(relative_change(score, own[task])) for task, score in values.items()}
    mean = fmean(values.values())  # NaN if one of them is
    return mean if kind == "mean" or isnan(mean) else min(values.values())


def _loss_ratios(folder: Path) -> dict[str, float]:
    evaluations = [record["eval"] for record in read_json_lines(folder / "metrics.jsonl") if "eval" in record]
    first, last = evaluations[0], evaluations[-1]
    return {task: _ratio(last[task]["loss"], first[task]["loss"]) for task in last}


def _ratio(loss: float | None, base: float | None) -> float:
    return nan if loss is None or not base else -loss / base


def scores(results: Results, folder: Path) -> dict[str, float]:
    """Each task's own metric on validation data."""
    found = {}
    for name, task in results.tasks.items():
        score = task.val.get(task.metric) if task.metric else None
        if score is None:
            raise UserError(
                f"{folder}: has no validation score of {name}. Take sweep.objective=mean_loss_ratio, or "
                "eval_scores=true."
            )
        found[name] = score
    return found


@lru_cache(maxsize=4)
def reference_scores(folder: str) -> Mapping[str, float]:
    """Each task's validation score of its single-task runs, mean over the seeds."""
    found: dict[str, list[float]] = {}
    for run in find_runs([Path(folder).expanduser()]).runs:
        for name, score in scores(run.results, run.folder).items():
            found.setdefault(name, []).append(score)
    return {name: fmean(values) for name, values in found.items()}
