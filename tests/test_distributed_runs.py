"""Several processes give what one gives."""

import json

import pytest
import torch
from safetensors.torch import load_file


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


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


@pytest.mark.parametrize(
    "layout",
    [
        "full",
        "experts",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("shared_and_per_task", "task_groups")),
    ],
)
def test_two_processes_train_like_one(tmp_path, command, layout, launch):
    command = [*command, f"adapters={layout}"]
    if layout == "task_groups":
        command.append("adapters.groups.some=[one,two]")
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


def test_ranks_stay_bit_identical_over_20_steps_with_dropout_and_repeat(tmp_path, command, launch):
    """The run itself compares the ranks' parameters at every save and would have failed; more ranks than examples."""
    longer = ["adapters.lora_dropout=0.3", "max_steps=20", "eval_steps=5", "batch_size=2"]
    for name in ("first", "second"):
        launch(3, *command, *longer, f"output_dir={tmp_path / name}")
    first, second = (
        load_file(tmp_path / name / "checkpoints" / "step-000022" / "tensors.safetensors")
        for name in ("first", "second")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() == (tmp_path / "second" / "metrics.jsonl").read_bytes()


def test_ranks_that_drift_apart_are_named(tmp_path, own_module, command, launch):
    own_module(
        "drifting_optimizer",
        "import os, torch\n"
        "class Drifting(torch.optim.AdamW):\n"
        "    def step(self, closure=None):\n"
        "        super().step(closure)\n"
        "        if os.environ['RANK'] == '1':\n"
        "            with torch.no_grad():\n"
        "                self.param_groups[0]['params'][0].view(-1)[0] += 1e-12\n",
    )
    finished = launch(
        2, *command, "optimizer._target_=drifting_optimizer.Drifting", f"output_dir={tmp_path / 'run'}", code=1
    )
    assert "The trainable parameters differ between rank 0 and ranks [1]" in finished.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_skipped_step_is_skipped_by_all(tmp_path, own_module, command, launch):
    """What is wrong with it is found out together: the search runs the tasks' backward passes again."""
    own_module(
        "broken_surgery",
        "from mtl.surgery import PCGrad\n"
        "class Broken(PCGrad):\n"
        "    calls = 0\n"
        "    def coefficients(self, gramian_MM, tasks=None):\n"
        "        self.calls += 1\n"
        "        return super().coefficients(gramian_MM, tasks) * (float('nan') if self.calls == 2 else 1.0)\n",
    )
    given = [*command, "surgery._target_=broken_surgery.Broken", "non_finite=skip", "adapters.lora_dropout=0"]
    given += ["stages=joint"]
    given = [item for item in given if not item.startswith("stages.weak")]
    for name, num_processes in (("one", 1), ("two", 2)):
        launch(num_processes, *given, f"output_dir={tmp_path / name}")
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert [record.get("skipped", False) for record in two] == [False, True, False, False, False]
    for expected, found in zip(one, two, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)
