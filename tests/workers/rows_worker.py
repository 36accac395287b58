"""Computes losses and rows of random steps on whatever ranks there are; rank 0 saves them. Not a test by itself."""

import sys

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from mtl.data.batching import Batch
from mtl.data.tokenized import TokenizedExample
from mtl.distributed import Distributed
from mtl.gradients import Backward
from mtl.models import LoraLayout
from mtl.models.precision import keep_float64

TASKS = 4


def random_step(generator):
    """Examples of unequal length and number; some steps have fewer examples than there are ranks, or absent tasks."""
    counts = generator.integers(0, 4, TASKS)
    counts[int(generator.integers(TASKS))] += 1
    examples = []
    for task, count in enumerate(counts):
        for _ in range(count):
            length = int(generator.integers(3, 30))
            ids = generator.integers(0, 258, length).astype(np.int32)
            examples.append((task, TokenizedExample(ids, np.arange(length) >= generator.integers(1, length))))
    return Batch(examples, TASKS)


def main(model_folder, output):
    accelerator = Accelerator(cpu=True)
    distributed = Distributed(accelerator)
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    keep_float64(model)
    layout = LoraLayout(model, TASKS, lora_r=3, private_lora_r=2, lora_dropout=0.0)
    torch.manual_seed(distributed.rank)  # ranks start apart on purpose; the broadcast must bring them together
    with torch.no_grad():
        for parameter in layout.parameters():
            parameter.normal_(std=0.3)
    distributed.broadcast_(parameter.data for parameter in layout.parameters())
    backward = Backward(model, layout, distributed, max_tokens=60, packing=True, seed=0)
    generator = np.random.default_rng(0)
    results = {}
    for case in range(12):
        batch = random_step(generator)
        for apart in (True, False):
            result = backward(batch, torch.ones(TASKS, dtype=torch.float64), step=case, apart=apart)
            results[f"{case}/{apart}/losses"] = result.losses_M.clone()
            results[f"{case}/{apart}/rows"] = result.shared_RN.clone()
            results[f"{case}/{apart}/private"] = torch.cat(result.private)
    distributed.check_identical(results.values(), "Losses and rows")
    if distributed.is_main:
        save_file(results, output)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
