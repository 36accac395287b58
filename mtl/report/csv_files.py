"""The comparison as CSV, for spreadsheets and for whoever draws other charts: a NaN is an empty field."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path

from mtl.report.comparison import Comparison, Duel, Interval, StrategyOutcome
from mtl.reporting.json_files import write_atomically

Value = str | int | float | None

SUMMARY = (
    *("strategy", "num_seeds", "mean", "mean_low", "mean_high", "worst", "worst_low", "worst_high", "worst_task"),
    *("num_hurt", "num_below", "mean_rank", "on_pareto_front", "per_seed_mean"),
    *("behind_best", "behind_best_low", "behind_best_high", "behind_best_p", "sign_flip_p"),
    *("steps", "tokens", "target_tokens", "seconds", "tokens_per_second", "peak_memory_bytes"),
)
TASKS = (
    *("strategy", "task", "metric", "seed", "score", "mean_score", "mean_score_low", "mean_score_high"),
    *("change", "change_low", "change_high", "difference", "difference_low", "difference_high", "p_adjusted"),
    *("loss", "epochs_seen", "examples_seen", "base_score", "reference_score"),
)


def write_csv_files(folder: Path, comparison: Comparison) -> None:
    """Writes ``summary.csv``, a row a strategy, and ``tasks.csv``, a row a strategy, task and seed."""
    duels = duels_over_mean(comparison)
    summary = (_summary_row(item, duels.get(item.name)) for item in comparison.strategies)
    _write(folder / "summary.csv", SUMMARY, summary)
    _write(folder / "tasks.csv", TASKS, (row for item in comparison.strategies for row in _task_rows(item, comparison)))


def duels_over_mean(comparison: Comparison) -> dict[str, Duel]:
    """How the strategy with the best mean compares with each of the others, by their names."""
    return {
        duel.other: duel for verdict in comparison.verdicts if verdict.aggregate == "mean" for duel in verdict.duels
    }


def _summary_row(item: StrategyOutcome, duel: Duel | None) -> Sequence[Value]:
    cost = item.cost
    return [
        *(item.name, len(item.runs), *_ends(item.mean), *_ends(item.worst), item.worst_task),
        *(item.num_hurt, item.num_below, item.mean_rank, int(item.on_pareto_front)),
        " ".join(f"{seed}:{'' if isnan(value) else value}" for seed, value in item.per_seed_mean.items()),
        *(_ends(duel.difference if duel else None)),
        *((duel.p_adjusted, duel.sign_flip_p) if duel else (None, None)),
        *(cost.steps, cost.tokens, cost.target_tokens, cost.seconds, cost.tokens_per_second, cost.peak_memory_bytes),
    ]


def _task_rows(item: StrategyOutcome, comparison: Comparison) -> Iterator[Sequence[Value]]:
    for name, task in item.tasks.items():
        for seed, score in task.per_seed.items():
            yield [
                *(item.name, name, comparison.metrics[name], seed, score, *_ends(task.score)),
                *(*_ends(task.change), *_ends(task.difference), task.p_adjusted),
                *(task.loss, task.epochs_seen, task.examples_seen),
                *(comparison.base[name], comparison.reference.get(name)),
            ]


def _ends(interval: Interval | None) -> tuple[Value, Value, Value]:
    return (None, None, None) if interval is None else (interval.value, interval.low, interval.high)


def _write(path: Path, header: Sequence[str], rows: Iterator[Sequence[Value]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([None if isinstance(value, float) and isnan(value) else value for value in row] for row in rows)
    write_atomically(path, text.getvalue().encode("utf-8", "replace"))
