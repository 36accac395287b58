"""A small run on three tasks, what an interruption leaves of it, and what must not depend on one."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from mtl.cli import main

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


@pytest.fixture
def command(arguments):
    """Trains in this process; returns the folder, or with ``code=None`` the exit code."""

    def run(output_dir, *overrides, code=0):
        found = main(["train", *arguments, f"output_dir={output_dir}", *overrides])
        if code is None:
            return found
        assert found == code
        return output_dir

    return run


@pytest.fixture
def interrupted_copy():
    """What a run that was killed after the checkpoint of ``step`` leaves: later records, even torn ones, too."""

    def copy(folder, step, target):
        shutil.copytree(folder, target)
        (target / "results.json").unlink()
        for later in (target / "checkpoints").glob("step-*"):
            if int(later.name.removeprefix("step-")) > step:
                shutil.rmtree(later)
        (target / "checkpoints" / "latest").write_text(f"step-{step:06d}")
        with (target / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"step": 99, "torn')
        return target

    return copy


@pytest.fixture
def outcome():
    """Everything that must not depend on an interruption: records, results without cost, final state and tensors."""

    def read(folder):
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        results.pop("cost")
        last = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text()
        state = json.loads((last / "state.json").read_text(encoding="utf-8"))
        for cost in ("training_seconds", "total_seconds"):
            state["run"].pop(cost)
        tensors = {key: value.numpy().tobytes() for key, value in load_file(last / "tensors.safetensors").items()}
        return (folder / "metrics.jsonl").read_bytes(), results, state, tensors

    return read
