"""Random steps, and what the library makes of them on whatever ranks there are. Not a test by itself.

Case i is a function of i alone, so that the test's own process knows what the workers compute.
"""

import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mtl.data.batching import Batch
from mtl.data.tokenized import TokenizedExample
from mtl.distributed import Distributed, local
from mtl.gradients import Backward
from mtl.models import FullLayout, LoraLayout
from mtl.models.precision import keep_float64

TASKS = 3
VOCABULARY = 61  # does not divide by the number of ranks: shards are unequal
LAYOUTS = {"shared": 0, "shared_and_per_task": 2, "full": None}  # ranks of the private adapters
DTYPES = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Case:
    """One step, and how to cut it."""

    layout: str
    examples: list
    scale_T: torch.Tensor
    apart: bool
    max_tokens: int
    packing: bool


def random_case(index):
    generator = np.random.default_rng([7, index])
    counts = generator.integers(0, [[2, 2, 3], [3, 3, 3], [8, 2, 2]][index % 3])  # absent tasks, one far larger
    counts[int(generator.integers(TASKS))] += 1  # a step of one example is fewer than the ranks
    longest = int(generator.choice([4, 12, 30]))
    examples = [(task, random_example(generator, longest)) for task in range(TASKS) for _ in range(counts[task])]
    return Case(
        layout=list(LAYOUTS)[int(generator.integers(len(LAYOUTS)))],
        examples=[examples[i] for i in generator.permutation(len(examples))],
        scale_T=torch.from_numpy(generator.uniform(0.1, 2.0, TASKS)),
        apart=bool(generator.integers(2)),
        max_tokens=int(generator.choice([1, 25, 60, 10_000])),
        packing=bool(generator.integers(2)),
    )


def random_example(generator, longest):
    """Targets anywhere, as of several turns; at least one after the first token."""
    length = int(generator.integers(2, longest + 1))
    is_target = generator.random(length) < generator.choice([0.2, 0.9])
    is_target[int(generator.integers(1, length))] = True
    return TokenizedExample(generator.integers(0, VOCABULARY, length).astype(np.int32), is_target)


def make(layout, dtype):
    """A tiny model, its weights tied where they are trained, and the layout on it: the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=layout == "full",
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    if dtype == torch.float64:
        keep_float64(model)
    if layout == "full":
        return model, FullLayout(model, TASKS)
    lora = LoraLayout(model, TASKS, lora_r=3, private_lora_r=LAYOUTS[layout], lora_dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters():  # B starts at 0, which would make every gradient of A 0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, lora


def gathered(distributed, parameters, rows_RN):
    """Rows whole, of which this rank may hold parts: those of every parameter's first dimension."""
    sizes = [local(parameter).numel() for parameter in parameters]
    ranks = zip(*distributed.gather(rows_RN.split(sizes, dim=1)), strict=True)
    return torch.cat([torch.cat(parts, dim=1) for parts in ranks], dim=1)


def results_of(distributed, cases):
    """Losses, rows and private gradients of all cases in both dtypes, by name."""
    results = {}
    made = {}
    for index, case in cases.items():
        for dtype in DTYPES:
            if (case.layout, dtype) not in made:
                model, layout = make(case.layout, dtype)
                made[case.layout, dtype] = distributed.place(model, layout.parameters()), layout
            model, layout = made[case.layout, dtype]
            backward = Backward(model, layout, distributed, max_tokens=case.max_tokens, packing=case.packing, seed=0)
            found = backward(Batch(case.examples, TASKS), case.scale_T, step=index, apart=case.apart)
            name = f"{index}/{str(dtype).removeprefix('torch.')}"
            results[f"{name}/losses"] = found.losses_M.clone()
            results[f"{name}/gramian"] = backward.gramian(found.shared_RN)
            rows_RN = found.shared_RN
            if backward.shards_rows:
                rows_RN = gathered(distributed, layout.shared_parameters(), rows_RN)
            results[f"{name}/rows"] = rows_RN.clone()
            for task, private in zip(found.tasks, found.private, strict=True):
                if private.numel():
                    results[f"{name}/private{task}"] = private.clone()
    if distributed.sharded:
        model, layout = made["full", torch.float64]
        parts = sum(local(parameter).numel() for parameter in layout.parameters())
        assert parts < 0.6 * sum(parameter.numel() for parameter in layout.parameters()), "nothing is sharded"
    return results


def main(num_cases, *outputs):
    """Writes the results with every parameter whole, and to a second file those with sharded ones."""
    accelerator = Accelerator(cpu=True)
    for output, sharded in zip(outputs, ("false", "true"), strict=False):
        os.environ.update(ACCELERATE_USE_FSDP=sharded, FSDP_VERSION="2")
        distributed = Distributed(accelerator)
        results = results_of(distributed, {index: random_case(index) for index in range(int(num_cases))})
        distributed.check_identical(results.values(), "Losses and rows")
        if distributed.is_main:
            save_file(results, output, {"ranks": str(distributed.world_size), "sharded": str(distributed.sharded)})
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
