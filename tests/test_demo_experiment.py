"""The committed results of the demo, and what the README says of them."""

import json
import subprocess
import sys
from pathlib import Path

from mtl.reporting.results import read_results

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "demo"


def test_the_readme_quotes_the_committed_results():
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, task in results["tasks"].items():
        metric = task["metric"]
        quoted = f"| {name} | {metric} |"
        [row] = [line for line in readme.splitlines() if line.startswith(quoted)]
        for number in (task["base"][metric], task["test"][metric], task["base"]["loss"], task["test"]["loss"]):
            assert f"{number:.3f}" in row, (name, number)


def test_the_committed_results_are_read_back():
    results = read_results(FOLDER / "results.json")
    assert len(results.tasks) == 8
    assert results.cost.steps == 56


def test_the_demo_moved_all_levers():
    lines = (FOLDER / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    joint = [record for record in steps if record["stage"] == "joint"]
    assert len({tuple(record["p"].values()) for record in joint}) > 10
    assert len({tuple(record["lambda"].values()) for record in joint}) > 10
    changed = [r for r in steps if any(abs(w - 1 / len(r["w"])) > 1e-9 for w in r["w"].values())]
    assert changed, "surgery never acted"
    assert {record["stage"] for record in steps} == {"joint", "weak"}


def test_the_plot_is_drawn_from_a_run(tmp_path):
    picture = tmp_path / "plot.png"
    subprocess.run([sys.executable, FOLDER / "plot.py", FOLDER, picture], check=True, capture_output=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
