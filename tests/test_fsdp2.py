"""A model spread over two processes trains, evaluates, exports and resumes like one that is not."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mtl.cli import main
from mtl.data.tokenized import TokenizedExample
from mtl.distributed import fsdp_requested
from mtl.errors import UserError
from mtl.evaluation.losses import summed_losses
from mtl.evaluation.options import option_log_likelihoods
from mtl.reporting.json_files import read_json_lines

COLOURS = ["red", "green", "blue"]
MARKS = ["a", "b"]  # one token and the end of the turn


@pytest.fixture
def fsdp2(launch):
    """Runs ``mtl.train`` on two CPU processes with FSDP2."""
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    return lambda *arguments, code=0: launch(2, "-m", "mtl.train", *arguments, code=code, **environment)


@pytest.fixture
def arguments(tmp_path, monkeypatch, tiny_folder, make_task):
    """Of a run that evaluates in every way there is, with fewer examples of one task than processes."""
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    free = make_task("free", [{"prompt": f"say {i}", "completion": "xy" * (1 + i % 4)} for i in range(30)])
    long = make_task("long", [{"prompt": f"{i} " * (1 + i % 5), "completion": COLOURS[i % 3]} for i in range(24)])
    short = make_task("short", [{"prompt": f"mark {i}", "completion": MARKS[i % 2]} for i in range(12)])
    return [
        *(f"model.name_or_path={tiny_folder}", "model.dtype=float64", "tasks=none"),
        *(f"tasks.free.path={free}", "tasks.free.max_new_tokens=5", "tasks.free.metric=exact_match"),
        *(f"tasks.long.path={long}", f"tasks.long.labels=[{','.join(COLOURS)}]", "tasks.long.scoring=likelihood"),
        *(f"tasks.short.path={short}", f"tasks.short.labels=[{','.join(MARKS)}]", "tasks.short.scoring=likelihood"),
        *("tasks.short.val_size=1", "tasks.short.test_size=1"),
        *("weighter=uncertainty", "surgery=pcgrad", "max_steps=4", "batch_size=5", "learning_rate=0.01"),
        *("micro_batch_tokens=90", "eval_micro_batch_tokens=150", "max_eval_examples=5", "max_test_examples=5"),
        *("eval_steps=2", "early_stopping_patience=5", "keep_last=9"),
    ]  # fmt: skip


LAYOUTS = {
    "shared_and_per_task": ["adapters=shared_and_per_task", "adapters.lora_dropout=0"],
    "full": ["adapters=full", "learning_rate=1e-3"],
}


def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_same_tensors(found_file, expected_file):
    found, expected = load_file(found_file), load_file(expected_file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        if tensor.is_floating_point() and tensor.norm() > 0:
            assert relative(found[name], tensor) < 1e-9, name
        else:
            assert torch.equal(found[name], tensor), name


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_alike(found, expected, where=""):
    """Equal but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_alike(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_alike(*pair, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), where
    else:
        assert found == expected, where


def assert_same_run(found, expected):
    """Every record, result, prediction, checkpoint and exported file."""
    assert_alike(records(found), records(expected))
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (found, expected)]
    assert_alike(results[0]["tasks"], results[1]["tasks"])
    for file in sorted((expected / "predictions").iterdir()):
        assert_alike(read_json_lines(found / "predictions" / file.name), read_json_lines(file))
    for pattern in ("checkpoints/*/tensors.safetensors", "adapters/*/*.safetensors", "model/*.safetensors"):
        files = sorted(file.relative_to(expected) for file in expected.glob(pattern))
        assert files == sorted(file.relative_to(found) for file in found.glob(pattern))
        for file in files:
            assert_same_tensors(found / file, expected / file)
    for file in (*expected.glob("adapters/*/*.json"), *expected.glob("model/*config.json")):
        assert (found / file.relative_to(expected)).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("layout", [pytest.param("shared_and_per_task", marks=pytest.mark.slow), "full"])
def test_a_sharded_run_is_the_run_of_one_process(tmp_path, arguments, fsdp2, layout):
    arguments = [*arguments, *LAYOUTS[layout]]
    one, two = tmp_path / "one", tmp_path / "two"
    # Each with a cache of its own, so that the model before training is evaluated on the ranks too.
    fsdp2(*arguments, f"output_dir={two}")
    shutil.rmtree(tmp_path / "cache" / "base")
    assert main(["train", *arguments, f"output_dir={one}"]) == 0
    assert_same_run(two, one)
    assert (one / "model" / "model.safetensors").is_file() == (layout == "full")

    # From its checkpoint a run goes on to the same end, sharded or not.
    for name in ("sharded", "whole"):
        shutil.copytree(two, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-000004")
    fsdp2(*arguments, f"output_dir={tmp_path / 'sharded'}", "resume_from_checkpoint=auto")
    for pattern in ("metrics.jsonl", "checkpoints/*/tensors.safetensors", "*/model.safetensors"):
        for file in two.glob(pattern):
            assert (tmp_path / "sharded" / file.relative_to(two)).read_bytes() == file.read_bytes(), file
    resumed = [*arguments, f"output_dir={tmp_path / 'whole'}", "resume_from_checkpoint=auto"]
    assert main(["train", *resumed]) == 0
    assert_same_run(tmp_path / "whole", one)


@pytest.mark.parametrize(("version", "answer"), [("2", True), ("1", UserError), (None, UserError)])
def test_only_version_2_is_taken(monkeypatch, version, answer):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    if answer is True:
        assert fsdp_requested()
    else:
        with pytest.raises(answer, match="--fsdp_version 2"):
            fsdp_requested()


def test_surgery_of_whole_gradients_is_refused(tmp_path, arguments, own_module, fsdp2):
    """GradDrop, say, goes by the elements of a row, of which each process would have a part."""
    own_module(
        "elementwise",
        "class Sign:\n"
        "    weights_act = 'yes'\n"
        "    def __init__(self, scale):\n"
        "        pass\n"
        "    def __call__(self, grads_MN, tasks=None):\n"
        "        return grads_MN.sign().mean(0)\n"
        "    def state_dict(self):\n"
        "        return {}\n"
        "    def load_state_dict(self, state):\n"
        "        pass\n",
    )
    arguments = [*arguments, *LAYOUTS["full"], "surgery._target_=elementwise.Sign", f"output_dir={tmp_path / 'run'}"]
    finished = fsdp2(*arguments, code=None)
    assert finished.returncode != 0
    assert "surgery=Sign: works on whole gradients" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_work_done_again_to_keep_step_changes_nothing(make_model):
    """Another rank has 5 batches, and options of 5 tokens, where this one's first options have a single token."""
    model = make_model()
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    ranks = SimpleNamespace(rank=0, world_size=2, sharded=True, gather=lambda value: [value, 5])
    settings = {"token_budget": 20, "on_batch": lambda num_examples: None}

    ids = [np.arange(3, 3 + length, dtype=np.int32) for length in (9, 7, 4)]
    examples = [TokenizedExample(row, np.arange(len(row)) > 1) for row in ids]
    alone = summed_losses(model, examples, **settings)
    assert len(forwards) == 2
    assert summed_losses(model, examples, **settings, ranks=ranks) == alone
    assert len(forwards) == 2 + 5

    prompts, options = [[7, 8, 9], [4, 5, 6, 7]], [[[10], [11]], [[12], [13]]]
    alone = option_log_likelihoods(model, prompts, options, **settings)
    forwards.clear()
    in_step = option_log_likelihoods(model, prompts, options, **settings, ranks=ranks)
    assert len(forwards) == 2 * 5
    for found, expected in zip(in_step, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-12)
