"""Plain loops around stock peft: the floor, and what other code does to get gradients or adapters per task.

Nothing here uses ``mtl``. Shape suffixes: B rows, S positions, N parameters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.examples import LEARNING_RATE, Example, counts, read_examples
from benchmarks.measuring import Measurement, Setup

ROW_LENGTH = 384
ROWS_PER_FORWARD = 2


class Floor:
    """Forward and backward of packed rows, with logits at target positions only. Nothing else: no optimizer."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def prepare(self) -> None:
        self.steps = read_examples(self.setup)
        self.model = lora_model(self.setup.model, self.setup.seed)

    def step(self, index: int) -> Measurement:
        examples = self.steps[index]
        num_targets = counts(examples)["num_targets"]
        self.model.zero_grad()
        packed_backward(self.model, examples, num_targets)
        return counts(examples)


class SwitchedAdapters:
    """An adapter a task, switched between the tasks' packed sub-batches."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def prepare(self) -> None:
        self.steps = read_examples(self.setup)
        tasks = sorted({example["task"] for step in self.steps for example in step})
        self.model = lora_model(self.setup.model, self.setup.seed, adapters=[f"task{task}" for task in tasks])
        parameters = [parameter for name, parameter in self.model.named_parameters() if "lora_" in name]
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    def step(self, index: int) -> Measurement:
        examples = self.steps[index]
        by_task: dict[int, list[Example]] = {}
        for example in examples:
            by_task.setdefault(example["task"], []).append(example)
        num_targets = counts(examples)["num_targets"]
        for task, own in by_task.items():
            self.model.set_adapter(f"task{task}")
            packed_backward(self.model, own, num_targets)
        finish_step(self.optimizer)
        return counts(examples)


class ParameterSpaceSurgery:
    """PCGrad as it is mostly done: T backwards, T flat copies, a Python double loop over projections of them.

    Args:
        setup: What all variants share.
        mixed: One padded forward of all tasks, whose graph is kept for T backwards; otherwise a padded forward of each
            task, all of whose graphs are kept until the last loss is known.
    """

    def __init__(self, setup: Setup, mixed: bool) -> None:
        self.setup = setup
        self.mixed = mixed

    def prepare(self) -> None:
        self.steps = read_examples(self.setup)
        self.model = lora_model(self.setup.model, self.setup.seed)
        self.parameters = trainable(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.random = random.Random(self.setup.seed)

    def step(self, index: int) -> Measurement:
        examples = self.steps[index]
        grads = []
        for loss in task_losses(self.model, examples, mixed=self.mixed):
            self.optimizer.zero_grad()
            loss.backward(retain_graph=self.mixed)
            grads.append(torch.cat([grad_of(parameter).flatten() for parameter in self.parameters]))
        assign(self.parameters, projected(grads, self.random))
        finish_step(self.optimizer)
        return counts(examples)


def lora_model(folder: str, seed: int, adapters: Sequence[str] = ("default",)) -> Any:  # noqa: ANN401
    """The model with LoRA adapters of rank 8 on every linear layer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = lora_config()
    wrapped = get_peft_model(model, config, adapter_name=adapters[0])
    for adapter in adapters[1:]:
        wrapped.add_adapter(adapter, config)
    return wrapped.train()


def lora_config() -> LoraConfig:
    """Rank 8 on every linear layer."""
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def packed_backward(
    model: Any,  # noqa: ANN401
    examples: Sequence[Example],
    num_targets: float,
    row_length: int = ROW_LENGTH,
    rows_per_forward: int = ROWS_PER_FORWARD,
) -> None:
    """Adds the gradient of the summed loss over ``num_targets``, a few packed rows at a time."""
    rows = pack(examples, row_length)
    for start in range(0, len(rows), rows_per_forward):
        tensors = stack(rows[start : start + rows_per_forward])
        input_ids_BS, position_ids_BS, keep_BS, labels = (tensor.to(model.device) for tensor in tensors)
        logits = model(
            input_ids=input_ids_BS, position_ids=position_ids_BS, use_cache=False, logits_to_keep=keep_BS
        ).logits
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), labels, reduction="sum") / num_targets
        loss.backward()


def pack(examples: Sequence[Example], row_length: int) -> list[list[Example]]:
    """Rows of at most so many positions, first fit, the longest examples first."""
    rows: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):
        length = len(example["input_ids"])
        for row in rows:
            if sum(len(other["input_ids"]) for other in row) + length <= row_length:
                row.append(example)
                break
        else:
            rows.append([example])
    return rows


def stack(rows: Sequence[Sequence[Example]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, positions and where the next token is a target, all [B, S], and those next tokens."""
    length = max(sum(len(example["input_ids"]) for example in row) for row in rows)
    input_ids_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    position_ids_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    keep_BS = torch.zeros(len(rows), length, dtype=torch.bool)
    labels = []
    for index, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example["input_ids"])
            ids, is_target = torch.tensor(example["input_ids"]), torch.tensor(example["is_target"])
            input_ids_BS[index, start:end] = ids
            position_ids_BS[index, start:end] = torch.arange(end - start)
            keep_BS[index, start : end - 1] = is_target[1:]
            labels.append(ids[1:][is_target[1:]])
            start = end
    return input_ids_BS, position_ids_BS, keep_BS, torch.cat(labels)


def task_losses(model: nn.Module, examples: Sequence[Example], *, mixed: bool) -> list[Tensor]:
    """Each task's mean loss, of padded rows: out of one forward, or out of one a task."""
    tasks = sorted({example["task"] for example in examples})
    by_task = [[example for example in examples if example["task"] == task] for task in tasks]
    if not mixed:
        return [padded_loss(model, own).mean() for own in by_task]
    losses = padded_loss(model, [example for own in by_task for example in own])
    return [part.mean() for part in losses.split([sum(sum(e["is_target"]) for e in own) for own in by_task])]


def padded_loss(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """The loss of every target token, example by example."""
    length = max(len(example["input_ids"]) for example in examples)
    input_ids_BS = torch.zeros(len(examples), length, dtype=torch.int64)
    mask_BS = torch.zeros_like(input_ids_BS)
    labels_BS = torch.full_like(input_ids_BS, -100)
    for index, example in enumerate(examples):
        ids, is_target = torch.tensor(example["input_ids"]), torch.tensor(example["is_target"])
        input_ids_BS[index, : len(ids)] = ids
        mask_BS[index, : len(ids)] = 1
        labels_BS[index, : len(ids)] = torch.where(is_target, ids, -100)
    logits = model(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False).logits[:, :-1]
    labels = labels_BS[:, 1:].flatten()
    losses = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="none")
    return losses[labels != -100]


def projected(grads: Sequence[Tensor], order: random.Random) -> Tensor:
    """PCGrad of flat gradients [N], in the words of its paper; mean instead of sum.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1.
    """
    combined = torch.zeros_like(grads[0])
    for index, grad in enumerate(grads):
        current = grad.clone()
        others = [other for position, other in enumerate(grads) if position != index]
        order.shuffle(others)
        for other in others:
            product = torch.dot(current, other)
            if product < 0:
                current -= product / torch.dot(other, other) * other
        combined += current
    return combined / len(grads)


def assign(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Makes ``flat`` [N] the gradient."""
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def grad_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient, which must be there."""
    assert parameter.grad is not None
    return parameter.grad


def finish_step(optimizer: torch.optim.Optimizer) -> None:
    """Clips, updates and forgets the gradient."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
