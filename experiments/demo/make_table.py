"""Prints a run's results as the README's table: ``python experiments/demo/make_table.py RUN``."""

import json
import sys
from pathlib import Path


def main(run: Path) -> None:
    """One row a task: metric and loss on test data before and after, and what was seen of the task."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    print("| task | metric | before | after | loss before | loss after | examples seen | epochs seen |")
    print("|---|---|---|---|---|---|---|---|")
    for name, task in results["tasks"].items():
        metric = task["metric"]
        numbers = (task["base"][metric], task["test"][metric], task["base"]["loss"], task["test"]["loss"])
        cells = [name, metric, *(f"{number:.3f}" for number in numbers)]
        print(f"| {' | '.join(cells)} | {task['examples_seen']} | {task['epochs_seen']:.2f} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
