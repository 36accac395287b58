"""Evaluating every task of a run: its loss, its answers and its metric."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from math import fsum
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mtl.data.batching import count_targets
from mtl.errors import UserError
from mtl.evaluation import metrics
from mtl.evaluation.answers import extract_answer
from mtl.evaluation.batches import Ranks, evaluating
from mtl.evaluation.generation import greedy_answers, stop_tokens
from mtl.evaluation.losses import summed_losses
from mtl.evaluation.options import log_likelihoods
from mtl.evaluation.prompts import read_batches
from mtl.evaluation.results import Prediction, TaskEvaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mtl.data.loading import EvalExample, TaskData
    from mtl.tasks.task import Task

Activate = Callable[[int | None], AbstractContextManager[None]]
Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    activate: Activate,
    data: Sequence[TaskData],
    *,
    split: str,
    max_examples: int | None,
    predict: bool,
    distributed: Ranks,
    token_budget: int,
    base: bool = False,
    progress: Progress | None = None,
) -> list[TaskEvaluation]:
    """Evaluates all tasks, each with its own adapters; the result is the same on every rank.

    Token budget and number of ranks change speed and memory, and the numbers by no more than rounding.

    Args:
        model: Causal language model with the layout's adapters.
        tokenizer: Its tokenizer.
        activate: The layout's ``activate``.
        data: The tasks, in the order of their indices.
        split: ``"val"`` or ``"test"``.
        max_examples: Evaluate only this many examples of a task, evenly spaced over the split.
        predict: Also find answers and score them, not only the loss.
        distributed: The run's ranks.
        token_budget: Positions of a batch, padding included.
        base: Evaluate the base model, without adapters.
        progress: Called after each batch with the task's name, and the examples done and to do on this rank; an
            example counts once for its loss and once for a generated answer.

    Raises:
        UserError: A task has no examples in the split.
    """
    evaluations = []
    with evaluating(model):
        for index, task_data in enumerate(data):
            examples = select_examples(task_data, split, max_examples)
            scored = predict and task_data.task.metric != "none"
            run = _Run(
                model,
                tokenizer,
                distributed,
                token_budget,
                _counter(task_data, examples, scored, distributed, progress),
            )
            with activate(None if base else index):
                evaluations.append(_evaluate_task(run, task_data.task, examples, scored))
    return evaluations


def select_examples(data: TaskData, split: str, max_examples: int | None) -> list[EvalExample]:
    """The examples that an evaluation of ``split`` looks at: evenly spaced, since files are often sorted.

    Raises:
        UserError: The split is empty.
    """
    examples = {"val": data.val, "test": data.test}[split]
    if not len(examples):
        raise UserError(
            f"Task {data.task.name!r} has no {split} examples. Add some or set tasks.{data.task.name}.{split}_size."
        )
    kept = len(examples) if max_examples is None else min(len(examples), max_examples)
    return [examples[i * len(examples) // kept] for i in range(kept)]


def trivial_score(data: TaskData, split: str, max_examples: int | None = None) -> float | None:
    """What the task's metric gives on these examples without looking at the prompt.

    That is the score of the commonest training label, or the expected score of a uniform guess among each row's
    options; ``None`` for free answers.
    """
    examples = select_examples(data, split, max_examples)
    references = [example.reference for example in examples]
    return metrics.trivial_score(data.task.metric, references, [example.options for example in examples], data.majority)


@dataclass(frozen=True)
class _Written:
    """An answer as it came, and whether it ended by itself."""

    text: str
    complete: bool = True


@dataclass(frozen=True)
class _Run:
    """What all passes over a task's examples share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    distributed: Ranks
    token_budget: int
    on_batch: Callable[[int], None]

    def over_ranks(
        self, work: Callable[[list[EvalExample]], Sequence[Result]], examples: Sequence[EvalExample]
    ) -> list[Result]:
        """Each rank works on its share of the examples, dealt out by length; all get all results, in order.

        With sharded parameters no rank is left without: it must take part in the others' forwards.
        """
        by_length = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens.input_ids))
        own = by_length[self.distributed.rank :: self.distributed.world_size]
        if self.distributed.sharded and not own:
            own = by_length[:1]
        results = work([examples[i] for i in own])
        parts = self.distributed.gather(dict(zip(own, results, strict=True)))
        gathered = {i: result for part in parts for i, result in part.items()}
        return [gathered[i] for i in range(len(examples))]


def _counter(
    data: TaskData, examples: Sequence[EvalExample], scored: bool, distributed: Ranks, progress: Progress | None
) -> Callable[[int], None]:
    own = len(range(distributed.rank, len(examples), distributed.world_size))
    total = 2 * own if scored and data.task.scoring == "generation" else own
    done = 0

    def count(num_examples: int) -> None:
        nonlocal done
        done = min(done + num_examples, total)  # ranks in step may do some again
        if progress is not None:
            progress(data.task.name, done, total)

    return count


def _evaluate_task(run: _Run, task: Task, examples: Sequence[EvalExample], scored: bool) -> TaskEvaluation:
    if task.scoring == "none":  # plain text, which has no prompts
        losses, written = _losses(run, examples), list[_Written]()
    else:
        losses, written = _losses_and_answers(run, task, examples, scored)
    targets = [count_targets(example.tokens) for example in examples]
    num_targets = sum(targets)
    # fsum rounds once, so the order of the examples cannot matter.
    loss = fsum(losses) / num_targets
    if not scored:
        return TaskEvaluation(loss, len(examples), num_targets, None, {}, [], losses)

    answers = [item.text for item in written]
    if task.scoring == "generation":
        multiline = any("\n" in example.reference.strip() for example in examples)
        answers = [
            extract_answer(text, pattern=task.answer_pattern, options=example.options, multiline=multiline)
            for text, example in zip(answers, examples, strict=True)
        ]
    scores = metrics.score_answers(
        task.metric, answers, [example.reference for example in examples], [example.options for example in examples]
    )
    predictions = [
        Prediction(
            prompt=example.prompt,
            reference=example.reference,
            prediction=item.text,
            answer=answer,
            score=score,
            location=example.location,
            loss=example_loss,
            num_targets=example_targets,
            complete=item.complete,
        )
        for example, item, answer, score, example_loss, example_targets in zip(
            examples, written, answers, scores.per_example, losses, targets, strict=True
        )
    ]
    return TaskEvaluation(loss, len(examples), num_targets, task.metric, scores.corpus, predictions, losses)


def _losses(run: _Run, examples: Sequence[EvalExample]) -> list[float]:
    """Each example's negative log-likelihood."""
    return run.over_ranks(
        lambda own: summed_losses(
            run.model,
            [example.tokens for example in own],
            token_budget=run.token_budget,
            on_batch=run.on_batch,
            ranks=run.distributed,
        ),
        examples,
    )


def _losses_and_answers(
    run: _Run, task: Task, examples: Sequence[EvalExample], scored: bool
) -> tuple[list[float], list[_Written]]:
    """Each example's negative log-likelihood; and, if scored, its likeliest option or the text that the model writes.

    The right answer is one of the candidates, so its likelihood is known with theirs. Only where the loss counts more
    than the last answer (several turns), or less than all of it (cut by the length limit), is there another pass.
    """
    chooses, writes = scored and task.scoring == "likelihood", scored and task.scoring == "generation"
    candidates = [_candidates(example, options=chooses) for example in examples]
    stops = stop_tokens(run.model, run.tokenizer, [example.tokens for example in examples])
    answered = run.over_ranks(partial(_answer, run, task.max_new_tokens if writes else 0, stops, chooses), examples)
    losses = [
        _loss_of_answer(example, options, likelihoods)
        for example, options, (likelihoods, _) in zip(examples, candidates, answered, strict=True)
    ]
    rest = [i for i, loss in enumerate(losses) if loss is None]
    uncounted = replace(run, on_batch=lambda num_examples: None)  # they have been, with their answers
    for i, loss in zip(rest, _losses(uncounted, [examples[i] for i in rest]), strict=True):
        losses[i] = loss
    written = [item for _, item in answered]
    if chooses:
        written = [
            _Written((example.options or ())[int(np.argmax(values))])
            for example, (values, _) in zip(examples, answered, strict=True)
        ]
    return [loss for loss in losses if loss is not None], written


def _answer(
    run: _Run, max_new_tokens: int, stops: Collection[int], chooses: bool, examples: Sequence[EvalExample]
) -> list[tuple[list[float], _Written]]:
    """The log-likelihood of each example's candidates, and what the model writes. A prompt is read once for both."""
    candidates = [_candidates(example, options=chooses) for example in examples]
    likelihoods: list[list[float]] = [[] for _ in examples]
    texts = [_Written("")] * len(examples)
    for batch, prompts in read_batches(
        run.model,
        [example.prompt_ids for example in examples],
        answer_lengths=[max([max_new_tokens, *map(len, options)]) for options in candidates],
        rows=[len(options) for options in candidates],
        token_budget=run.token_budget,
        ranks=run.distributed,
    ):
        found = log_likelihoods(prompts, [candidates[i] for i in batch], ranks=run.distributed)
        run.on_batch(len(batch))
        written = [_Written("")] * len(batch)
        if max_new_tokens:
            tokens = greedy_answers(prompts, max_new_tokens=max_new_tokens, stops=stops, ranks=run.distributed)
            decoded = run.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # The stop token is not among them, so an answer of full length has none.
            written = [_Written(text, len(ids) < max_new_tokens) for text, ids in zip(decoded, tokens, strict=True)]
            run.on_batch(len(batch))
        for i, values, item in zip(batch, found, written, strict=True):
            likelihoods[i], texts[i] = values, item
    return list(zip(likelihoods, texts, strict=True))


def _candidates(example: EvalExample, *, options: bool) -> Sequence[Sequence[int]]:
    """What to find the likelihood of: all options, or only the right answer."""
    if options:
        return example.option_ids or ()
    answer = tuple(example.tokens.input_ids[len(example.prompt_ids) :].tolist())
    return (answer or example.prompt_ids[-1:],)  # of an answer that is cut away altogether, anything


def _loss_of_answer(
    example: EvalExample, candidates: Sequence[Sequence[int]], likelihoods: Sequence[float]
) -> float | None:
    """The example's loss, if that is the likelihood of one of the candidates."""
    start, length = len(example.prompt_ids), len(example.tokens.input_ids)
    answer = tuple(example.tokens.input_ids[start:].tolist())
    if answer not in candidates or np.flatnonzero(example.tokens.is_target).tolist() != list(range(start, length)):
        return None
    return -likelihoods[candidates.index(answer)]
