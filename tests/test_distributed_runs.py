"""Several processes give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent / "workers" / "rows_worker.py"


def launch(num_processes, *command):
    """Runs a script or module on CPU processes, the one way that works with accelerate (see README)."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    prefix = [sys.executable]
    if num_processes > 1:
        prefix += [
            *("-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={num_processes}"),
            *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
        ]
    finished = subprocess.run(
        [*prefix, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def rows_of_one_process(tmp_path_factory, tiny_folder):
    output = tmp_path_factory.mktemp("rows") / "one.safetensors"
    launch(1, WORKER, tiny_folder, output)
    return load_file(output)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_losses_and_rows_of_random_steps(tmp_path, tiny_folder, rows_of_one_process, num_processes):
    output = tmp_path / "many.safetensors"
    launch(num_processes, WORKER, tiny_folder, output)
    found = load_file(output)
    assert found.keys() == rows_of_one_process.keys()
    for key, expected in rows_of_one_process.items():
        assert relative(found[key], expected) < 1e-9, key


@pytest.fixture
def command(tmp_path, monkeypatch, tiny_folder, make_task):
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    paths = {
        name: make_task(name, [{"prompt": f"{name} {i}", "completion": "ab" * (1 + i % 5)} for i in range(size)])
        for name, size in {"one": 20, "two": 50, "three": 100}.items()
    }
    return [
        *("-m", "mtl.train", f"model.name_or_path={tiny_folder}", "model.dtype=float64", "tasks=none"),
        *(f"tasks.{name}.path={path}" for name, path in paths.items()),
        *("weighter=uncertainty", "surgery=pcgrad", "stages=joint_then_weak", "stages.weak.max_steps=2"),
        *("max_steps=5", "batch_size=7", "learning_rate=1e-3", "eval_scores=false", "max_eval_examples=4"),
        *("max_test_examples=4", "evals_per_stage=1", "keep_last=9"),
    ]  # fmt: skip


def steps(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "loss" in record]


@pytest.mark.parametrize("layout", ["shared_and_per_task", "full"])
def test_two_processes_train_like_one(tmp_path, command, layout):
    command = [*command, f"adapters={layout}"]
    if layout != "full":
        command.append("adapters.lora_dropout=0")
    launch(1, *command, f"output_dir={tmp_path / 'one'}")
    launch(2, *command, f"output_dir={tmp_path / 'two'}")
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == len(two) == 7
    for expected, found in zip(one, two, strict=True):
        assert found["counts"] == expected["counts"]
        assert found["p"] == expected["p"]
        for key in ("loss", "w", "lambda", "grad_norm_task"):
            assert found[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12), (expected["step"], key)
    for step in ("step-000005", "step-000007"):
        expected = load_file(tmp_path / "one" / "checkpoints" / step / "tensors.safetensors")
        found = load_file(tmp_path / "two" / "checkpoints" / step / "tensors.safetensors")
        for key, tensor in expected.items():
            if tensor.is_floating_point() and tensor.norm() > 0:
                assert relative(found[key], tensor) < 1e-9, (step, key)


def test_two_processes_with_dropout_stay_bit_identical_and_repeat(tmp_path, command):
    """The run itself compares the ranks' parameters at every save and would have failed."""
    for name in ("first", "second"):
        launch(2, *command, "adapters.lora_dropout=0.3", f"output_dir={tmp_path / name}")
    first, second = (
        load_file(tmp_path / name / "checkpoints" / "step-000007" / "tensors.safetensors")
        for name in ("first", "second")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() == (tmp_path / "second" / "metrics.jsonl").read_bytes()
