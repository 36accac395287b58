"""A tiny chat model and its tokenizer, made from nothing, for all tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only waits
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ACCELERATE_USE_CPU"] = "true"

import absl.logging
import pytest
import torch
from safetensors.torch import load_file

# TensorBoard brings absl, whose handler closes its stream when Hydra sets logging up, unless that is the present or the
# first standard error. Made within a test it would hold pytest's, and close that under the next test with capsys.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=TEMPLATE,
    )


def tiny_model(dtype=torch.float64, seed=0):
    """A Llama of two layers and 258 tokens (the bytes and two markers), with weights large enough to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mtl.models.precision import keep_float64

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    if dtype == torch.float64:
        keep_float64(model)
    return model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_tokenizer):
    """The tiny model as a folder, float32."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(torch.float32).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_model():
    return tiny_model


def write_jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_task(tmp_path):
    """Writes a task's rows as a single JSONL file and returns its path."""

    def make(name, rows):
        return write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)

    return make


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module of a user's own, and puts it where every process finds it."""

    def write(name, source):
        folder = tmp_path / "own"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return write


@pytest.fixture
def launch():
    """Runs a script or module on CPU processes by ``accelerate launch``, the one way that works (see README)."""

    def run(num_processes, *command, code=0, **environment):
        prefix = [sys.executable]
        if num_processes > 1:
            prefix += [
                *("-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={num_processes}"),
                *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
            ]
        finished = subprocess.run(
            [*prefix, *map(str, command)],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert code is None or finished.returncode == code, finished.stdout + finished.stderr
        return finished

    return run


@pytest.fixture
def command(arguments):
    """Trains in this process by a folder's own ``arguments``; returns the run, or with ``code=None`` the exit code."""

    from mtl.cli import main

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


class AskedLater:
    """A stop signal that comes at the k-th time that somebody looks."""

    def __init__(self, looks):
        self._looks = looks

    @property
    def received(self):
        self._looks -= 1
        return 15 if self._looks == 0 else 0

    @contextmanager
    def listening(self):
        yield


@pytest.fixture
def asked_later(monkeypatch):
    """Lets the run within the block be asked to stop at the k-th time that it looks for that."""

    @contextmanager
    def asking(looks):
        with monkeypatch.context() as patch:
            patch.setattr("mtl.job.StopSignal", lambda: AskedLater(looks))
            yield

    return asking
