"""Runs of several stages on tasks that contradict each other: the same prompts, other answers."""

import json

import pytest

NUM_ROWS = 60


@pytest.fixture
def arguments(tmp_path, monkeypatch, tiny_folder, make_task):
    """Of ``mtl train``: a model that is asked the same by two tasks, one wants yes and the other no."""
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    answers = {
        "agrees": lambda i: "no" if i % 10 == 0 else "yes",
        "denies": lambda i: "yes" if i % 10 == 0 else "no",
        "counts": lambda i: str(i % 3),
    }
    paths = {
        name: make_task(name, [{"prompt": f"question {i}", "completion": answer(i)} for i in range(NUM_ROWS)])
        for name, answer in answers.items()
    }
    return [
        *(f"model.name_or_path={tiny_folder}", "model.dtype=float64", "tasks=none"),
        *(f"tasks.{name}.path={path}" for name, path in paths.items()),
        *(f"tasks.{name}.labels=['yes','no']" for name in ("agrees", "denies")),
        "tasks.counts.labels=['0','1','2']",
        *(f"tasks.{name}.metric=accuracy" for name in paths),
        *(f"tasks.{name}.{split}_size=20" for name in paths for split in ("val", "test")),
        *("adapters.lora_dropout=0", "batch_size=8", "learning_rate=0.02", "warmup_ratio=0", "scheduler=constant"),
        *("keep_last=99", "evals_per_stage=2"),
    ]


@pytest.fixture
def results():
    """A run's ``results.json``."""
    return lambda folder: json.loads((folder / "results.json").read_text(encoding="utf-8"))
