"""A tiny run of three tasks, and branches that go on from it with different emphasis."""

import json

import pytest

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

    def run(name, *overrides, multirun=False):
        folder = root / name
        if not folder.exists():
            place = ["-m", f"sweep.dir={folder}"] if multirun else [f"output_dir={folder}"]
            assert main(["train", *arguments, *place, *overrides]) == 0
        return folder

    return run


@pytest.fixture(scope="session")
def first(train):
    """The run that the branches begin with."""
    return train("first")


@pytest.fixture(scope="session")
def branches(train, first):
    """Two of them, for one task each."""
    return [
        train(f"for_{task}", f"resume_from={first}", *FORK, f"stages.weak_replay.tasks=[{task}]")
        for task in ("small", "large")
    ]


@pytest.fixture
def merged(tmp_path):
    """Merges: ``merged(*arguments)`` gives the folder, or with ``code`` nothing but checks the exit code."""

    def run(*arguments, output="merged", code=0):
        assert main(["merge", *map(str, arguments), "--output", str(tmp_path / output)]) == code
        return tmp_path / output

    return run


@pytest.fixture
def read():
    """A JSON file."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))
