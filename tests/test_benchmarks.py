"""Every comparison that needs no other library runs on a tiny model and leaves results; no ratio is looked at."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.__main__ import measured, parsed
from benchmarks.comparisons import COMPARISONS, Claim, Comparison
from benchmarks.measuring import MeasurementError, Setup, Spec, check_same_work, in_process, measure, worker_process
from benchmarks.table import HEADER, make_row, markdown_line

ROOT = Path(__file__).parent.parent
QUICK = {"floor", "retained-graph", "private-adapters", "labels", "overhead-1024", "sampler"}
OURS = [
    pytest.param(comparison, id=comparison.name, marks=() if comparison.name in QUICK else pytest.mark.slow)
    for comparison in COMPARISONS
    if not comparison.needs
]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def setup(caches, tmp_path, tiny_folder):
    return Setup(model=str(tiny_folder), seed=3, threads=1, rounds=1, seconds=0, eval_examples=2, folder=str(tmp_path))


def small(comparison):
    """The comparison with 16 small tasks instead of 1,024."""
    variants = {}
    for name, spec in comparison.variants.items():
        options = dict(spec.options)
        if spec.target == "product.Overhead" and "num_tasks" in options:
            overrides = [text for text in options["overrides"] if not text.startswith("batch_size")]
            options |= {"num_tasks": 16, "overrides": [*overrides, "batch_size=8"]}
        variants[name] = replace(spec, options=options)
    return replace(comparison, variants=variants)


@pytest.mark.parametrize("comparison", OURS)
def test_a_comparison_runs_and_fills_its_lines(comparison, setup):
    comparison = small(comparison)
    found = measured(comparison, setup, in_process)
    assert {name: len(measurements) for name, measurements in found.items()} == dict.fromkeys(comparison.variants, 1)
    for [measurement] in found.values():
        assert measurement["seconds"] > 0
        assert measurement["peak_bytes"] > 2**20
        assert 0 <= measurement.get("overhead", 0) < 1
    for claim in comparison.claims:
        row = make_row(comparison, claim, found)
        assert row.lowest <= row.ratio <= row.highest
        assert row.met is None or isinstance(row.met, bool)
        assert markdown_line(row).count("|") == HEADER.count("|")


def run_command(tmp_path, *arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments, "--threads", "1", "--out", tmp_path]
    finished = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[2] == HEADER
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results["rows"]) == len(table) - 4
    assert not results["failures"]
    return results


def test_the_command_writes_results(tmp_path, tiny_folder):
    results = run_command(tmp_path, "samp*", "--model", tiny_folder, "--rounds", "3", "--seed", "5")
    assert (results["about"]["threads"], results["about"]["seed"]) == (1, 5)
    few, many = results["rows"]
    assert (few["ours"], many["ours"]) == ("16 examples", "64 examples")
    for row in (few, many):
        seconds = sorted(found["seconds"] for found in results["measurements"]["sampler"][row["ours"]])
        assert [row["lowest"], row["ratio"], row["highest"]] == seconds
        assert row["met"] == (seconds[1] <= 0.002)


@pytest.mark.slow
def test_processes_of_their_own_do_the_same_work(caches, tmp_path, tiny_folder):
    results = run_command(tmp_path, "floor", "--model", tiny_folder, "--rounds", "2")
    ours, floor = results["measurements"]["floor"].values()
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(ours, floor, strict=True))
    [row] = results["rows"]
    assert [row["lowest"], row["highest"]] == pytest.approx(ratios)
    assert [found["num_targets"] for found in ours] == [found["num_targets"] for found in floor]


def test_ratios_are_of_the_same_round_and_targets_look_the_right_way():
    found = {
        "ours": [{"seconds": seconds, "num_examples": 8, "peak_bytes": 2} for seconds in (1.0, 2.0, 4.0)],
        "other": [{"seconds": seconds, "num_examples": 4, "peak_bytes": 6} for seconds in (3.0, 4.0, 4.0)],
    }
    comparison = Comparison("any", {}, [])

    def row(quantity, other="other", **target):
        return make_row(comparison, Claim("", quantity, "ours", other, **target), found)

    assert (row("seconds").ratio, row("seconds").lowest, row("seconds").highest) == (2.0, 1.0, 3.0)
    assert row("seconds", at_most=0.6).ratio == 0.5
    assert row("seconds", at_most=0.6).met
    assert not row("seconds", at_least=2.1).met
    assert row("examples a second").ratio == 4.0  # twice the examples in half the time
    assert row("examples a second", at_least=4).met
    assert row("peak memory", at_least=3).met
    assert row("seconds", other=None, at_most=2.0).met
    assert row("seconds", other=None, at_most=1.9).met is False
    assert row("seconds").met is None


def test_different_work_is_refused():
    with pytest.raises(MeasurementError, match="num_targets"):
        check_same_work({"a": {"num_targets": 5, "num_tokens": 9}, "b": {"num_targets": 6, "num_tokens": 9}})


def test_a_variant_that_fails_says_why(setup):
    broken = {"broken": Spec("startup.Help", {"no_such_option": 1})}
    with pytest.raises(MeasurementError, match=r"startup\.Help: TypeError: .*no_such_option"):
        measure(broken, setup, same_work=True, start=worker_process)


def test_a_missing_library_is_named(setup):
    absent = Comparison("absent", {}, [], needs=["no_such_library"])
    with pytest.raises(MeasurementError, match=r"no_such_library.*\[bench\]"):
        measured(absent, setup)


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        parsed(["flor"])
    assert "no comparison is called flor" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gpu_benchmark_runs_small(caches, tmp_path):
    from benchmarks.gpu import main

    small_run = ["--device", "cpu", "--size", "tiny", "--batch-size", "8", "--rounds", "1"]
    assert main([*small_run, "--out", str(tmp_path)]) == 0
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0] for line in table[4:]] == ["| mtl, mean", "| mtl, PCGrad", "| floor"]
    measurements = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["measurements"]
    assert all(measurement["flops"] > 0 for measurement in measurements["floor"])


def test_the_gpu_benchmark_refuses_a_machine_without_gpu(monkeypatch, capsys):
    import torch

    from benchmarks.gpu import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--device cuda" in line


@pytest.mark.slow
@pytest.mark.parametrize("comparison", [item for item in COMPARISONS if item.needs], ids=lambda item: item.name)
def test_other_libraries_run_where_installed(comparison, setup):
    if any(importlib.util.find_spec(module) is None for module in comparison.needs):
        pytest.skip("optional")
    found = measured(comparison, setup, in_process)
    assert all(len(measurements) == 1 for measurements in found.values())


def test_the_readme_shows_the_table_of_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    caption, _, rows = (ROOT / "benchmarks" / "table.md").read_text(encoding="utf-8").strip().partition("\n\n")
    assert caption in readme
    assert rows in readme
