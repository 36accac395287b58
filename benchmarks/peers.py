"""Other libraries at the same work: TRL's trainer, TorchJD's surgery."""

from __future__ import annotations

import tempfile
import threading
from queue import SimpleQueue
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.bare import finish_step, lora_config, lora_model, task_losses, trainable
from benchmarks.examples import LEARNING_RATE, MAX_LENGTH, counts, read_examples
from benchmarks.measuring import Measurement, Setup


class Trl:
    """Steps of TRL's ``SFTTrainer``, which trains in a thread that waits between them.

    Args:
        setup: What all variants share.
        packing: TRL's packing, with as many rows a step as hold the tokens of a step of the others.
        gradient_checkpointing: TRL's default is to recompute activations in the backward.
    """

    def __init__(self, setup: Setup, packing: bool = False, gradient_checkpointing: bool = True) -> None:
        self.setup = setup
        self.packing = packing
        self.gradient_checkpointing = gradient_checkpointing

    def prepare(self) -> None:
        from trl import SFTConfig, SFTTrainer

        steps = read_examples(self.setup)
        examples = [example for step in steps for example in step]
        num_rows = len(steps[0])
        if self.packing:
            num_rows = max(1, round(counts(examples)["num_tokens"] / len(steps) / MAX_LENGTH))
        labels = [
            [token if target else -100 for token, target in zip(e["input_ids"], e["is_target"], strict=True)]
            for e in examples
        ]
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(self.setup.model, dtype=torch.float32),
            args=SFTConfig(
                output_dir=tempfile.mkdtemp(dir=self.setup.folder),
                per_device_train_batch_size=num_rows,
                max_length=MAX_LENGTH,
                packing=self.packing,
                gradient_checkpointing=self.gradient_checkpointing,
                learning_rate=LEARNING_RATE,
                max_steps=len(steps),
                train_sampling_strategy="sequential",
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                seed=self.setup.seed,
            ),
            train_dataset=Dataset.from_dict({"input_ids": [e["input_ids"] for e in examples], "labels": labels}),
            processing_class=AutoTokenizer.from_pretrained(self.setup.model),
            peft_config=lora_config(),
            callbacks=[Gate(self)],
        )
        self.counted: Measurement = {}
        self.turns: SimpleQueue[bool] = SimpleQueue()
        self.done: SimpleQueue[Measurement | BaseException] = SimpleQueue()
        training_step = trainer.training_step

        def counting_step(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:  # noqa: ANN401
            mask = inputs.get("attention_mask")
            self.counted = {
                "num_tokens": int(inputs["input_ids"].numel() if mask is None else mask.sum()),
                "num_targets": int((inputs["labels"] != -100).sum()),
            }
            return training_step(model, inputs, *rest)

        trainer.training_step = counting_step
        self.trainer = trainer
        threading.Thread(target=self.train, daemon=True).start()

    def train(self) -> None:
        """Runs the trainer, which goes on by one step whenever it is told to."""
        torch.set_num_threads(self.setup.threads)  # which holds for one thread
        try:
            self.turns.get()
            self.trainer.train()
        except BaseException as error:
            self.done.put(error)

    def step(self, index: int) -> Measurement:
        self.turns.put(True)
        answer = self.done.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Gate(TrainerCallback):
    """Holds the trainer at the end of each step."""

    def __init__(self, owner: Trl) -> None:
        self.owner = owner

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        self.owner.done.put(self.owner.counted)
        self.owner.turns.get()


class TorchJD:
    """TorchJD's Jacobian of the tasks' losses, one row at a time, and its PCGrad; of a padded forward like others."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def prepare(self) -> None:
        from torchjd.aggregation import PCGrad

        self.steps = read_examples(self.setup)
        self.model = lora_model(self.setup.model, self.setup.seed)
        self.parameters = trainable(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.surgery = PCGrad()

    def step(self, index: int) -> Measurement:
        from torchjd.autojac import backward, jac_to_grad

        examples = self.steps[index]
        losses = task_losses(self.model, examples, mixed=True)
        backward(losses, inputs=self.parameters, parallel_chunk_size=1)
        jac_to_grad(self.parameters, self.surgery)
        finish_step(self.optimizer)
        return counts(examples)
