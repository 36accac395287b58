"""What each task scores when it is trained alone: the reference that other runs are compared with while they go on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from mtl.errors import UserError
from mtl.reporting.results import Results, read_results


def reference_scores(folder: str | Path, place: str) -> Mapping[str, float]:
    """Each task's own metric on validation data, mean over the finished runs in ``folder``, at any depth.

    Args:
        folder: Of single-task runs (``mtl train -m experiment=single_task``), or of one run.
        place: The option that names it, for messages.

    Raises:
        UserError: There is no finished run, or one without validation scores.
    """
    found: dict[str, list[float]] = {}
    path = Path(folder).expanduser()
    for file in sorted(path.rglob("results.json")):
        for name, score in validation_scores(read_results(file), file.parent, place).items():
            found.setdefault(name, []).append(score)
    if not found:
        raise UserError(f"{place}={folder}: holds no finished run. Give the folder of the single-task runs.")
    return {name: fmean(values) for name, values in found.items()}


def validation_scores(results: Results, folder: Path, place: str) -> dict[str, float]:
    """Each task's own metric on validation data; of tasks that have one.

    Raises:
        UserError: The run has only validated losses.
    """
    found = {}
    for name, task in results.tasks.items():
        if task.metric is None:
            continue
        score = task.val.get(task.metric)
        if score is None:
            raise UserError(
                f"{folder}: has no validation score of {name}, which {place} needs. Run it with eval_scores=true."
            )
        found[name] = score
    return found
