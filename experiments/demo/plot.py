"""Draws a finished run: ``python experiments/demo/plot.py RUN OUTPUT.png``."""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def main(run: Path, output: Path) -> None:
    """Scores before and after, validation loss against the base model, and what the levers did."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval" in record]
    names = list(results["tasks"])
    colours = plt.get_cmap("tab10").colors

    figure, (bars, losses, levers) = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1.3, 1, 1))
    places = np.arange(len(names))
    for shift, split, colour in ((-0.2, "base", "0.7"), (0.2, "test", "tab:blue")):
        scores = [task[split][task["metric"]] for task in results["tasks"].values()]
        bars.bar(places + shift, scores, 0.38, color=colour, label={"base": "before", "test": "after"}[split])
    labels = [f"{name}\n{task['metric']}" for name, task in results["tasks"].items()]
    bars.set_xticks(places, labels, rotation=35, ha="right", fontsize=7)
    bars.set_title("test score", fontsize=10)
    bars.legend(fontsize=8, frameon=False)

    base = {name: values["loss"] for name, values in evaluations[0]["eval"].items()}
    for name, colour in zip(names, colours, strict=False):
        ratios = [record["eval"][name]["loss"] / base[name] for record in evaluations]
        losses.plot([record["step"] for record in evaluations], ratios, color=colour, label=name, marker=".")
        present = [record for record in steps if name in record["p"]]
        levers.plot([record["step"] for record in present], [record["p"][name] for record in present], color=colour)
    losses.set_title("validation loss / before training", fontsize=10)
    losses.set_ylim(bottom=0)
    losses.legend(fontsize=6, frameon=False)
    levers.set_title("sampling probability", fontsize=10)
    for axis in (losses, levers):
        axis.set_xlabel("step", fontsize=8)
    for axis in (bars, losses, levers):
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
