"""A small run on three tasks."""

import pytest

WORDS = ["red", "green", "blue", "up", "down"]
SIZES = {"small": 24, "middle": 40, "large": 90}


@pytest.fixture
def arguments(tmp_path, monkeypatch, tiny_folder, make_task):
    """Of ``mtl train`` for a small run."""
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    paths = {
        name: make_task(name, [{"prompt": f"{name} {i}", "completion": f"{WORDS[i % 5]}{i % 3}"} for i in range(size)])
        for name, size in SIZES.items()
    }
    return [
        f"model.name_or_path={tiny_folder}",
        "tasks=none",
        *(f"tasks.{name}.path={path}" for name, path in paths.items()),
        *(f"tasks.{name}.max_new_tokens=4" for name in paths),
        "batch_size=5",
        "learning_rate=0.01",
        "max_eval_examples=3",
        "max_test_examples=3",
        "eval_steps=1",
        "keep_last=99",
    ]
