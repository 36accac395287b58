"""Prints what second stages have changed: ``python experiments/staged_suite/make_table.py JOINT SECOND...``.

Differences of test scores have paired bootstrap intervals of 95 % over the examples.
"""

import sys
from pathlib import Path

import numpy as np

from mtl.evaluation.resampling import resampled_scores, sufficient_statistics
from mtl.evaluation.statistics import percentile_interval, resample_examples
from mtl.reporting.results import read_predictions, read_results


def main(joint: Path, *seconds: Path) -> None:
    """One row a task and second stage."""
    before = read_results(joint / "results.json")
    print("| stage | task | chosen | validation before | after | test before | after | difference | 95 % interval |")
    print("|---|---|---|---|---|---|---|---|---|")
    for folder in seconds:
        after = read_results(folder / "results.json")
        stage = after.stages[-1]
        for name, task in after.tasks.items():
            metric, old = task.metric, before.tasks[name]
            files = [run / "predictions" / f"{name}.jsonl" for run in (joint, folder)]
            low, high = interval(metric, files)
            numbers = [old.val[metric], task.val[metric], old.test[metric], task.test[metric]]
            same = files[0].read_bytes() == files[1].read_bytes()
            shown = "same bytes" if same else f"{low:+.3f} to {high:+.3f}"
            cells = [f"{number:.3f}" for number in numbers]
            chosen = "yes" if name in stage["tasks"] else ""
            row = [stage["stage"], name, chosen, *cells, f"{numbers[3] - numbers[2]:+.3f}", shown]
            print(f"| {' | '.join(row)} |")


def interval(metric: str, files: list[Path]) -> tuple[float, float]:
    """Of the second file's score less the first one's."""
    systems = []
    for rows in map(read_predictions, files):
        columns = zip(*((row.answer, row.reference, row.score) for row in rows), strict=True)
        systems.append(sufficient_statistics(metric, *map(list, columns)))
    counts_RN = resample_examples(len(systems[0].values_NK), np.random.default_rng(0))
    scores_RA = resampled_scores(counts_RN, systems)
    return percentile_interval(scores_RA[:, 1] - scores_RA[:, 0])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
