"""mtl merge: what it leaves, what it costs, and that its choice rests on validation data alone."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import mtl
import mtl.merging.merge as merging
import mtl.prepare as preparing
from mtl.checkpoint import newest_checkpoint
from mtl.cli import main
from mtl.merging.candidates import mix
from mtl.reporting.json_files import read_json_lines
from mtl.reporting.results import read_results


def parameters_of(folder):
    """Of the newest checkpoint, in numpy."""
    end, _ = newest_checkpoint(folder)
    return {name: value.numpy() for name, value in end.state["parameters"].items()}


def bytes_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix in (".jsonl", ".safetensors")
    }


@pytest.fixture
def start_and_branches(first, branches):
    return [*branches, "--start", first]


def test_a_mixture_is_the_sum_of_differences_and_a_point_keeps_its_bits():
    generator = torch.Generator().manual_seed(0)
    start, one, two = (torch.randn(5, 3, generator=generator) for _ in range(3))
    weights = (Fraction(1, 6), Fraction(2, 7), 1 - Fraction(1, 6) - Fraction(2, 7))
    by_differences = start.double() + (one.double() - start) / 6 + (two.double() - start) * 2 / 7
    torch.testing.assert_close(mix([one, two, start], weights), by_differences.float(), rtol=1e-6, atol=1e-7)
    assert mix([one, two, start], (Fraction(0), Fraction(1), Fraction(0))) is two


def test_fork_merge_report_and_train_on(first, sweep, branches, merged, read, tmp_path, train, capsys):
    folder = merged(sweep, "--start", first, "--max-evaluations", 14)
    assert str(folder / "results.json") in capsys.readouterr().out
    chosen = read(folder / "merge.json")
    names = [branch.name for branch in branches]
    assert sorted(chosen["runs"]) == sorted([*names, "start"])
    assert chosen["objective"] >= max(run["objective"] for run in chosen["runs"].values())

    # The parameters are the mixture, by an independent sum.
    points = {name: parameters_of(branch) for name, branch in zip(names, branches, strict=True)}
    points["start"] = parameters_of(first)
    found = parameters_of(folder)
    assert found.keys() == points["start"].keys()
    tasks = list(chosen["private"])
    for name, value in found.items():
        own = [task for index, task in enumerate(["small", "middle", "large"]) if f"task{index}" in name]
        weights = chosen["private"].get(own[0]) if own else chosen["weights"]
        if weights is None:  # untrained since the start, so the same in all
            weights = {"start": 1.0}
        expected = sum(weight * points[point][name].astype(np.float64) for point, weight in weights.items())
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
    assert sorted(tasks) == ["large", "small"]  # no branch has trained the own parameters of the third

    # The costs: what is shared once, what each has had once.
    parts = [read_results(run / "results.json") for run in (first, *branches)]
    results = read_results(folder / "results.json")
    assert [part.cost.steps for part in parts] == [6, 12, 12]
    assert results.cost.steps == 18
    for key in ("tokens", "target_tokens"):
        begun, *ends = (getattr(part.cost, key) for part in parts)
        assert getattr(results.cost, key) == begun + sum(end - begun for end in ends)
    for name, task in results.tasks.items():
        begun, *ends = (part.tasks[name].examples_seen for part in parts)
        assert task.examples_seen == begun + sum(end - begun for end in ends)
    assert results.cost.seconds > max(part.cost.seconds for part in parts)
    assert results.cost.peak_memory_bytes >= max(part.cost.peak_memory_bytes for part in parts)

    # What was tried, and what is said last.
    candidates = read_json_lines(folder / "candidates.jsonl")
    assert len(candidates) == chosen["num_evaluations"] <= chosen["max_evaluations"]
    described = [str((item.get("weights"), item.get("private"))) for item in candidates]
    assert len(set(described)) == len(described)
    evaluations = [record for record in read_json_lines(folder / "metrics.jsonl") if "eval" in record]
    assert [record["stage"] for record in evaluations][:1] == ["before training"]
    assert evaluations[-1]["stage"] == "merged"
    assert len(evaluations) == len(candidates) + 2
    for name, values in evaluations[-1]["eval"].items():
        assert values["loss"] == results.tasks[name].val["loss"]

    # It is a run: it can be handed over, it reports, and training goes on from it.
    assert main(["export", str(folder), "--all"]) == 0
    capsys.readouterr()
    assert main(["eval", str(folder)]) == 0
    assert "exactly as in the run's results.json" in capsys.readouterr().out
    assert main(["report", str(folder), str(sweep), "--output", str(tmp_path / "report")]) == 0
    shown = capsys.readouterr().out
    assert "merged" in shown
    assert not list(tmp_path.glob(".*merging"))
    on = train("on", f"resume_from={folder}", "stages=joint_then_weak", "stages.weak.max_steps=1")
    assert read_results(on / "results.json").cost.steps == 19
    assert [record["stage"] for record in read_results(on / "results.json").stages][-1] == "weak"


def test_the_best_mixture_is_found_where_it_is_known(train, changed, merged, read, tmp_path):
    """Branches at either side of a run that has learnt all there is: 5/8 of one and 3/8 of the other are it."""
    rows = tmp_path / "certain.jsonl"
    rows.write_text("".join(f'{{"prompt": "question {i}", "completion": "yes"}}\n' for i in range(20)))
    paths = [f"tasks.{name}.path={rows}" for name in ("small", "middle", "large")]
    run = train("certain", *paths, "adapters=shared", "stages.joint.max_steps=40")
    learnt = parameters_of(run)
    generator = torch.Generator().manual_seed(1)
    shifts = {name: torch.randn(value.shape, generator=generator) for name, value in learnt.items()}

    def shifted(scale):
        def change(state):
            for name, value in state["parameters"].items():
                value += scale * shifts[name]

        return change

    one, two = changed(run, "one", shifted(0.24)), changed(run, "two", shifted(-0.4))
    chosen = read(merged(one, two) / "merge.json")
    assert chosen["weights"] == {"one": 5 / 8, "two": 3 / 8}
    assert chosen["objective"] > max(item["objective"] for item in chosen["runs"].values()) + 0.1
    for name, value in parameters_of(tmp_path / "merged").items():
        np.testing.assert_allclose(value, learnt[name], atol=1e-6)


def test_the_same_again_gives_the_same(start_and_branches, merged):
    folders = [merged(*start_and_branches, "--max-evaluations", 6, output=name) for name in ("a/merged", "b/merged")]
    assert bytes_of(folders[0]) == bytes_of(folders[1])


def test_a_merge_can_be_merged_and_a_branch_can_be_called_start(first, branches, merged, read, tmp_path):
    shutil.copytree(branches[0], tmp_path / "start")
    once = merged(tmp_path / "start", branches[1], "--start", first, "--max-evaluations", 3, output="once")
    assert sorted(read(once / "merge.json")["runs"]) == sorted(["start", branches[1].name, str(first)])
    twice = merged(branches[1], once, "--max-evaluations", 2)
    assert read_results(twice / "results.json").cost.steps == 12 + 18


class Untouchable:
    """A test split that can't be read until the weights are chosen."""

    def __init__(self, items, chosen):
        self.items, self.chosen = items, chosen

    def __getattr__(self, name):
        assert self.chosen(), "the test split was read"
        return getattr(self.items, name)

    def __len__(self):
        assert self.chosen(), "the test split was read"
        return len(self.items)

    def __getitem__(self, index):
        assert self.chosen(), "the test split was read"
        return self.items[index]


def test_the_test_split_is_not_read_before_the_weights_are_chosen(
    start_and_branches, first, merged, monkeypatch, tmp_path
):
    shutil.rmtree(first.parent / "cache" / "base")  # nor what is known of it
    chosen = tmp_path / ".merged.merging" / "merged" / "merge.json"
    load = preparing.load_data

    def guarded(*arguments):
        return [replace(item, test=Untouchable(item.test, chosen.exists)) for item in load(*arguments)]

    monkeypatch.setattr(preparing, "load_data", guarded)
    folder = merged(*start_and_branches, "--max-evaluations", 4)
    assert (folder / "results.json").exists()


def test_scores_can_be_what_counts(branches, merged, read):
    folder = merged(*branches, "--select", "worst_score", "--max-evaluations", 4)
    chosen, results = read(folder / "merge.json"), read_results(folder / "results.json")
    assert chosen["select"] == "worst_score"
    assert chosen["objective"] == min(task.val["chrf"] for task in results.tasks.values())
    assert results.strategy["merged"] == "worst_score"


def test_changes_go_by_a_reference(branches, first, merged, read):
    folder = merged(*branches, "--select", "mean_change", "--reference", first, "--max-evaluations", 3)
    values = [task.val["chrf"] for task in read_results(folder / "results.json").tasks.values()]
    own = [task.val["chrf"] for task in read_results(first / "results.json").tasks.values()]
    changes = [(value - before) / max(abs(before), 0.05) for value, before in zip(values, own, strict=True)]
    assert read(folder / "merge.json")["objective"] == pytest.approx(np.mean(changes))


def noisy(seed):
    def change(state):
        generator = torch.Generator().manual_seed(seed)
        for value in state["parameters"].values():
            value += 0.02 * torch.randn(value.shape, generator=generator).to(value.dtype)

    return change


MORE_LAYOUTS = ("shared", "shared_a_per_task_b", "task_groups", "experts")


@pytest.mark.parametrize(
    "adapters",
    [
        "per_task",
        "full",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("shared", "shared_a_per_task_b", "task_groups", "experts")
        ),
    ],
)
def test_every_layout(adapters, train, changed, merged, read):
    options = ["adapters.groups.one=[small,middle]", "adapters.groups.two=[large]"] if adapters == "task_groups" else []
    run = train(adapters, f"adapters={adapters}", *options, "stages.joint.max_steps=1", "keep_last=1")
    one, two = (changed(run, name, noisy(seed)) for seed, name in enumerate(("one", "two")))
    folder = merged(one, two, "--start", run, "--max-evaluations", 5)
    chosen = read(folder / "merge.json")
    assert ("weights" in chosen) == (adapters != "per_task")
    assert ("private" in chosen) == (adapters in ("per_task", "shared_a_per_task_b", "experts"))  # of experts: gates
    assert chosen["objective"] >= max(item["objective"] for item in chosen["runs"].values())
    assert (folder / ("model" if adapters == "full" else "adapters")).is_dir()


def test_a_signal_leaves_nothing(branches, merged, monkeypatch, tmp_path, capsys):
    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(merging, "add_costs", stopped)
    merged(*branches, code=128 + signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []
    assert "nothing was written" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kill_leaves_no_half_output(branches, tmp_path):
    command = (
        "import os, mtl.merging.merge as merging; from mtl.cli import main\n"
        "merging.correct_peak = lambda *arguments: os.kill(os.getpid(), 9)\n"  # all is written, but not renamed
        f"main(['merge', *{[str(branch) for branch in branches]}, '--output', 'merged', '--max-evaluations', '2'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mtl.__file__).parents[1])}
    killed = subprocess.run(
        [sys.executable, "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / ".merged.merging" / "merged" / "results.json").exists()
    assert main(["merge", *map(str, branches), "--output", str(tmp_path / "merged"), "--max-evaluations", "2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
