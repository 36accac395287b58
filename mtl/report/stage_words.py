"""What became of the stages of runs, in sentences: which tasks were weak, and whether others were harmed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mtl.errors import UserError

if TYPE_CHECKING:
    from mtl.report.runs import FinishedRun

MAX_RUNS = 6  # of more, what the others have to say is in their results.json


def stage_sentences(runs: Sequence[FinishedRun]) -> list[str]:
    """One for each stage that chose its tasks or had a guard, of the first runs that have such stages.

    Raises:
        UserError: The records of a run's stages are damaged.
    """
    told = [(run, sentences) for run in runs if (sentences := _readable(run))]
    lines = [
        f"{run.strategy}, seed {run.seed}, {sentence}" for run, sentences in told[:MAX_RUNS] for sentence in sentences
    ]
    if len(told) > MAX_RUNS:
        lines.append(f"{len(told) - MAX_RUNS} more runs have such stages; their results.json says what became of them.")
    return lines


def _readable(run: FinishedRun) -> list[str]:
    try:
        return list(_of_run(run))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{run.folder / 'results.json'}: stages must be what a run has written, found: {error!r}; run it again, or "
            "leave it out."
        ) from error


def _of_run(run: FinishedRun) -> Iterator[str]:
    for record in run.results.stages:
        if record.get("skipped"):
            yield f"stage {record['stage']}: skipped, {record['skipped']}."
        elif record.get("weakness") or record.get("guard"):
            yield f"stage {record['stage']}: trained {_chosen(record)}.{_guarded(record.get('guard'))}"


def _chosen(record: Mapping[str, Any]) -> str:
    names = list(record["tasks"])
    weakness = record.get("weakness")
    if not weakness:
        return ", ".join(names)
    values = [f"{name} ({weakness['tasks'][name]:.2f})" for name in names]
    return f"{', '.join(values)}, weakest by {weakness['by']} on validation data"


def _guarded(guard: Mapping[str, Any] | None) -> str:
    if guard is None:
        return ""
    if not guard["harmed"]:
        return " No other task fell too far there."
    fallen = ", ".join(f"{name} by {drop:.3f}" for name, drop in guard["harmed"].items())
    kept = f"{guard['scale']:.0%} of its change is kept" if guard["scale"] else "it was rolled back"
    return f" There {fallen} fell too far, so {kept}."
