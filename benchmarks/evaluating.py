"""Evaluation in ``mtl``, and example by example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.examples import Question, make_run, read_examples
from benchmarks.measuring import Measurement, Setup

NEW_TOKENS = 32
# A rate needs no more: of each task every fourth example.
ONE_BY_ONE_SHARE = 4


class Product:
    """``mtl``'s evaluation of the tasks that are scored in one way.

    Args:
        setup: What all variants share.
        overrides: Of the config.
    """

    def __init__(self, setup: Setup, overrides: Sequence[str]) -> None:
        self.setup = setup
        self.overrides = overrides

    def prepare(self) -> None:
        self.run, _ = make_run(self.setup, self.overrides)

    def tasks(self, scoring: str) -> list[Any]:
        """Those scored so."""
        return [data for data in self.run.data if data.task.scoring == scoring]

    def num_examples(self, index: int) -> int:
        """Of each task; the warm-up takes one."""
        return self.setup.eval_examples if index else 1


class Labels(Product):
    """Answers chosen by likelihood, with their losses and scores."""

    def step(self, index: int) -> Measurement:
        from mtl.evaluation.evaluate import evaluate

        evaluations = evaluate(
            self.run.model,
            self.run.tokenizer,
            self.run.layout.activate,
            self.tasks("likelihood"),
            split="test",
            max_examples=self.num_examples(index),
            predict=True,
            distributed=self.run.distributed,
            token_budget=self.run.options.eval_micro_batch_tokens,
        )
        return {"num_examples": sum(evaluation.num_examples for evaluation in evaluations)}


class Generation(Product):
    """Answers of exactly 32 tokens: nothing ends one earlier."""

    def step(self, index: int) -> Measurement:
        from mtl.evaluation.batches import evaluating
        from mtl.evaluation.evaluate import select_examples
        from mtl.evaluation.generation import generate_answers

        lengths: list[int] = []
        with evaluating(self.run.model):
            for task, data in enumerate(self.tasks("generation")):
                examples = select_examples(data, "test", self.num_examples(index))
                with self.run.layout.activate(task):
                    answers = generate_answers(
                        self.run.model,
                        [example.prompt_ids for example in examples],
                        max_new_tokens=NEW_TOKENS,
                        stops=(),
                        token_budget=self.run.options.eval_micro_batch_tokens,
                        on_batch=lambda num_prompts: None,
                    )
                lengths += map(len, answers)
        assert set(lengths) == {NEW_TOKENS}
        return {"num_examples": len(lengths)}


class OneByOne:
    """Stock transformers and peft, one example after the other."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def prepare(self) -> None:
        from benchmarks.bare import lora_model

        self.questions: list[list[Question]] = read_examples(self.setup)
        self.model = lora_model(self.setup.model, self.setup.seed).eval()

    def chosen(self, index: int) -> list[Question]:
        """The questions of a round."""
        step = ONE_BY_ONE_SHARE if index else self.setup.eval_examples
        return [question for task in self.questions for question in task[::step]]


class LabelsOneByOne(OneByOne):
    """A forward of prompt and label for every label."""

    @torch.no_grad()
    def step(self, index: int) -> Measurement:
        questions = self.chosen(index)
        for question in questions:
            likelihoods = [self.likelihood(question["prompt"], option) for option in question["options"]]
            assert max(likelihoods) <= 0
        return {"num_examples": len(questions)}

    def likelihood(self, prompt: list[int], option: list[int]) -> float:
        """``log p(option | prompt)`` [nats]."""
        logits = self.model(input_ids=torch.tensor([prompt + option]), logits_to_keep=len(option) + 1).logits[0, :-1]
        return float(logits.log_softmax(-1)[torch.arange(len(option)), option].sum())


class GenerationOneByOne(OneByOne):
    """``model.generate`` for every prompt, 32 tokens each."""

    @torch.no_grad()
    def step(self, index: int) -> Measurement:
        questions = self.chosen(index)
        for question in questions:
            prompt = torch.tensor([question["prompt"]])
            tokens = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            assert tokens.shape[1] - prompt.shape[1] == NEW_TOKENS
        return {"num_examples": len(questions)}
