"""A tiny run of three tasks, and branches that go on from it with different emphasis."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mtl
from mtl.checkpoint import newest_checkpoint, save_checkpoint
from mtl.cli import main

WORDS = ["red", "green", "blue", "up", "down"]
SIZES = {"small": 24, "middle": 40, "large": 60}
FORK = [
    "stages=weak_replay",
    "stages.weak_replay.max_steps=6",
    *(f"stages.weak_replay.{key}" for key in ("guard=none", "replay=0", "l2_to_start=0")),
]


@pytest.fixture(scope="session")
def train(tmp_path_factory, tiny_folder):
    """Trains in this process, each run once: ``train(name, *overrides)`` gives its folder."""
    root = tmp_path_factory.mktemp("merging")
    paths = {name: root / f"{name}.jsonl" for name in SIZES}
    for name, path in paths.items():
        rows = [{"prompt": f"{name} {i}", "completion": f"{WORDS[i % 5]}{i % 3}"} for i in range(SIZES[name])]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = [
        *(f"model.name_or_path={tiny_folder}", "tasks=none", f"cache_dir={root / 'cache'}"),
        *(f"tasks.{name}.path={path}" for name, path in paths.items()),
        *(f"tasks.{name}.max_new_tokens=4" for name in paths),
        *("batch_size=6", "learning_rate=0.02", "max_eval_examples=4", "max_test_examples=3", "evals_per_stage=1"),
        *("warmup_ratio=0", "scheduler=constant", "stages.joint.max_steps=6"),
    ]

    def run(name, *overrides, sweep=False):
        folder = root / name
        if sweep:  # in a process of its own: Hydra leaves the files of its logs open
            command = ["train", "-m", *arguments, f"sweep.dir={folder}", *overrides]
            environment = {**os.environ, "PYTHONPATH": str(Path(mtl.__file__).parents[1])}
            subprocess.run([sys.executable, "-m", "mtl.cli", *command], env=environment, check=True)
        elif not folder.exists():
            assert main(["train", *arguments, f"output_dir={folder}", *overrides]) == 0
        return folder

    return run


@pytest.fixture(scope="session")
def first(train):
    """The run that the branches begin with."""
    return train("first")


@pytest.fixture(scope="session")
def sweep(train, first):
    """Two branches, for one task each."""
    tasks = "stages.weak_replay.tasks=[small],[large]"
    return train("branches", f"resume_from={first}", *FORK, tasks, sweep=True)


@pytest.fixture(scope="session")
def branches(sweep):
    """Their folders."""
    return sorted((file.parent for file in sweep.glob("*/results.json")), reverse=True)  # small before large


@pytest.fixture
def changed(tmp_path):
    """A copy of a run with another end: ``changed(folder, name, change)``, which edits the state in place."""

    def copy(folder, name, change):
        target = tmp_path / name
        shutil.copytree(folder, target)
        end, _ = newest_checkpoint(target)
        change(end.state)
        options = {"environment": end.environment, "value": None, "keep_last": 1, "keep_best": 0}
        save_checkpoint(target / "checkpoints", end.step, end.state, **options)
        return target

    return copy


@pytest.fixture
def merged(tmp_path):
    """Merges: ``merged(*arguments)`` gives the folder, whether it is there or not; checks the exit code."""

    def run(*arguments, output="merged", code=0):
        assert main(["merge", *map(str, arguments), "--output", str(tmp_path / output)]) == code
        return tmp_path / output

    return run


@pytest.fixture
def read():
    """A JSON file."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))
