"""``python -m benchmarks.gpu``: a Llama of 1.2 billion random weights in bfloat16 on one GPU.

Tokens per second, peak memory and model FLOPs utilisation of ``mtl`` (mean and PCGrad) and of a bare loop of packed
forward and backward. The FLOPs of a step, of which recomputation or padding is no part:

    4 P tokens + 6 P_lora tokens + 4 V d targets + 6 layers d sum(length^2)

with P the frozen weights of the linear layers (2 forward and 2 for the gradient of their inputs; their own gradient,
the other 2 of the usual 6, is not computed), P_lora the adapters' weights, V d the output embedding, needed at targets
only, and the causal attention of every example to itself (2 length^2 d forward for scores and values, twice that
backward).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.bare import packed_backward, trainable
from benchmarks.examples import Example, counts, read_examples, write_steps
from benchmarks.measuring import Measurement, MeasurementError, Setup, Spec, measure, worker_process
from benchmarks.product import Training
from benchmarks.table import gibibytes

ROW_LENGTH = 4096
LORA_R = 16
NUM_TASKS = 8
SIZES: dict[str, dict[str, Any]] = {
    "1.2b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
# Dense bfloat16 with float32 accumulation [FLOPs a second], by a part of the device's name; the first that fits.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


class GpuTraining(Training):
    """Steps of ``mtl`` on the device, waited for."""

    def step(self, index: int) -> Measurement:
        return on_device(lambda: super(GpuTraining, self).step(index))


class GpuFloor:
    """Forward and backward of packed rows, nothing else.

    Args:
        setup: What all variants share.
        device: Where.
    """

    def __init__(self, setup: Setup, device: str) -> None:
        self.setup = setup
        self.device = device

    def prepare(self) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self.steps = read_examples(self.setup)
        model: Any = AutoModelForCausalLM.from_pretrained(self.setup.model, dtype=torch.bfloat16).to(self.device)
        config = LoraConfig(r=LORA_R, lora_alpha=2 * LORA_R, lora_dropout=0.0, target_modules="all-linear")
        self.model = get_peft_model(model, config).train()

    def step(self, index: int) -> Measurement:
        return on_device(lambda: self.passes(self.steps[index]))

    def passes(self, examples: Sequence[Example]) -> Measurement:
        """Forward and backward."""
        self.model.zero_grad()
        with torch.autocast(self.device, torch.bfloat16):
            packed_backward(self.model, examples, counts(examples)["num_targets"], ROW_LENGTH, rows_per_forward=1)
        return {**counts(examples), "flops": self.flops(examples)}

    def flops(self, examples: Sequence[Example]) -> float:
        """Of a step; see the formula above."""
        config = self.model.config
        embedding = config.vocab_size * config.hidden_size
        lora = sum(parameter.numel() for parameter in trainable(self.model))
        linear = sum(
            parameter.numel() for name, parameter in self.model.named_parameters() if name.endswith("base_layer.weight")
        )
        counted = counts(examples)
        squares = sum(len(example["input_ids"]) ** 2 for example in examples)
        attention = 6 * config.num_hidden_layers * config.hidden_size * squares
        heads = 4 * embedding * counted["num_targets"]
        return float((4 * linear + 6 * lora) * counted["num_tokens"] + heads + attention)


def on_device(work: Any) -> Measurement:  # noqa: ANN401
    """Does the work and waits for the GPU; its peak memory is that of the GPU then."""
    if not torch.cuda.is_available():
        return dict(work())
    torch.cuda.reset_peak_memory_stats()
    counted = work()
    torch.cuda.synchronize()
    return {**counted, "peak_bytes": torch.cuda.max_memory_allocated()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table and writes it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to see that it runs")
    parser.add_argument("--size", choices=list(SIZES), default="1.2b")
    parser.add_argument("--batch-size", type=int, default=64, help="examples of about 500 tokens in a step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of gpu.json and gpu.md")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks: error: --device cuda: there is no CUDA GPU here. Run it where there is one; --device cpu "
            "--size tiny shows that it runs.",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as folder:
        write_model(Path(folder) / "model", arguments.size, arguments.seed)
        overrides = [*run_overrides(arguments), *write_tasks(Path(folder) / "data", arguments.seed)]
        setup = Setup(
            model=str(Path(folder) / "model"),
            seed=arguments.seed,
            threads=os.cpu_count() or 1,
            rounds=arguments.rounds,
            seconds=float("inf"),
            eval_examples=1,
            folder=folder,
        )
        setup = replace(setup, examples=write_steps(setup, overrides, setup.rounds + 1))
        variants = {
            "mtl, mean": Spec("gpu.GpuTraining", {"overrides": [*overrides, "surgery=mean"]}),
            "mtl, PCGrad": Spec("gpu.GpuTraining", {"overrides": [*overrides, "surgery=pcgrad"]}),
            "floor": Spec("gpu.GpuFloor", {"device": arguments.device}),
        }
        try:
            found = measure(variants, setup, same_work=True, start=worker_process)
        except MeasurementError as error:
            print(f"benchmarks: error: {error}", file=sys.stderr)
            return 1
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    table = markdown(found, device, arguments.size)
    print(table, end="")
    arguments.out.mkdir(parents=True, exist_ok=True)
    content = {"device": device, "size": arguments.size, "torch": torch.__version__, "measurements": found}
    (arguments.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "gpu.md").write_text(table, encoding="utf-8")
    return 0


def run_overrides(arguments: argparse.Namespace) -> list[str]:
    """Of the config: a shared adapter, micro-batches of 4,096 positions, equally many examples of each task."""
    return [
        *("adapters=shared", f"adapters.lora_r={LORA_R}", "adapters.lora_dropout=0", "sampler=equal"),
        *("model.dtype=bfloat16", f"use_cpu={str(arguments.device == 'cpu').lower()}", f"max_length={ROW_LENGTH}"),
        *(f"batch_size={arguments.batch_size}", f"micro_batch_tokens={ROW_LENGTH}"),
    ]


def write_model(folder: Path, size: str, seed: int) -> None:
    """Writes a Llama of random weights and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=ROW_LENGTH, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special[1], pad_token=special[1], chat_template=template
    ).save_pretrained(folder)


def write_tasks(folder: Path, seed: int) -> list[str]:
    """Writes tasks of random letters, a quarter of them answers; returns their overrides."""
    letters = random.Random(seed)
    folder.mkdir()
    overrides = ["tasks=none"]
    for task in range(NUM_TASKS):
        rows = []
        for _ in range(256):
            length = letters.randint(200, 500)
            text = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz ", k=length + length // 3))
            rows.append(json.dumps({"prompt": "p" + text[:length], "completion": "c" + text[length:]}))
        file = folder / f"task{task}.jsonl"
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
        overrides += [f"tasks.task{task}.path={file}", f"tasks.task{task}.metric=none"]
    return overrides


def markdown(found: dict[str, list[Measurement]], device: str, size: str) -> str:
    """Tokens per second, memory and utilisation of each variant."""
    peak_flops = next((peak for name, peak in PEAK_FLOPS.items() if name in device), None)
    lines = [
        f"{device}; Llama {size}, random weights, bfloat16, torch {torch.__version__}.",
        "",
        "| | tokens/s | spread | time of the floor | peak memory | model FLOPs utilisation |",
        "|---|---|---|---|---|---|",
    ]
    flops = [measurement["flops"] for measurement in found["floor"]]
    floor = [measurement["seconds"] for measurement in found["floor"]]
    for name, measurements in found.items():
        seconds = [measurement["seconds"] for measurement in measurements]
        rates = [measurement["num_tokens"] / measurement["seconds"] for measurement in measurements]
        ratio = median(a / b for a, b in zip(seconds, floor, strict=True))
        used = median(work / time for work, time in zip(flops, seconds, strict=True))
        peak = max(measurement["peak_bytes"] for measurement in measurements)
        share = f"{100 * used / peak_flops:.1f} %" if peak_flops else f"{used / 1e12:.3g} TFLOPs/s"
        cells = [f"{median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}", f"{ratio:.2f}x", gibibytes(peak)]
        lines.append(f"| {name} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
