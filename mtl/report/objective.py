"""What a search over strategies maximises: one number a run, from validation data only."""

from __future__ import annotations

from math import nan
from pathlib import Path

from mtl.errors import UserError
from mtl.evaluation.objectives import objective_of
from mtl.reporting.json_files import read_json_lines
from mtl.reporting.references import reference_scores, validation_scores
from mtl.reporting.results import read_results


def objective(folder: Path, name: str, reference: str | None) -> float:
    """:func:`mtl.evaluation.objectives.objective_of` a finished run.

    Args:
        folder: Of the run.
        name: One of ``OBJECTIVES``.
        reference: Folder of the single-task runs, for ``change``.

    Raises:
        UserError: The run has no validation scores, or the reference lacks a task.
    """
    evaluations = [record["eval"] for record in read_json_lines(folder / "metrics.jsonl") if "eval" in record]
    first, last = evaluations[0], evaluations[-1]
    scores = {} if name.endswith("loss_ratio") else scores_of(folder)
    references = dict.fromkeys(last) if reference is None else dict(reference_scores(reference, "sweep.reference"))
    missing = [task for task in scores if task not in references]
    if missing:
        raise UserError(f"sweep.reference={reference}: must have a run of each task, and has none of {missing[0]}.")
    return objective_of(
        name,
        [{"loss": known(last[task]["loss"])} | ({"score": scores[task]} if task in scores else {}) for task in last],
        [{"loss": known(first[task]["loss"]) or nan} for task in last],  # nothing can be divided by 0
        [references.get(task) for task in last],
    )


def known(loss: float | None) -> float:
    """A loss of the records, where null stands for one that was not finite."""
    return nan if loss is None else loss


def scores_of(folder: Path) -> dict[str, float]:
    """Each task's own metric on validation data.

    Raises:
        UserError: There is none.
    """
    found = validation_scores(read_results(folder / "results.json"), folder, "sweep.objective")
    if not found:
        raise UserError(f"{folder}: has no task with a score. Take sweep.objective=mean_loss_ratio.")
    return found
