"""``mtl predict``: a task's answers to the rows of a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mtl.data.tokenized import TokenizedExample
from mtl.errors import UserError
from mtl.evaluation.answers import extract_answer
from mtl.evaluation.generation import generate_answers, stop_tokens
from mtl.evaluation.metrics import score_answers
from mtl.evaluation.options import option_log_likelihoods
from mtl.handover.deployment import DeployedTask
from mtl.handover.loading import LoadedModel
from mtl.handover.rows import PromptRow, PromptTokens, tokenize
from mtl.reporting.json_files import to_json
from mtl.tasks.rendering import Renderer
from mtl.tasks.task import Task

ROWS_AT_ONCE = 512  # answered, and written, together


def answerable(task: DeployedTask, rows: Sequence[PromptRow]) -> Task:
    """The task with its scoring decided, as the loading of its data would.

    Raises:
        UserError: The task has no answers, or a row lacks the options to choose from.
    """
    if task.metric is None:
        raise UserError(f"--task {task.task.name}: is plain text, which has no answers to predict.")
    lacking = next((row.conversation.location for row in rows if row.conversation.options is None), None)
    scoring = task.task.scoring
    if scoring == "auto":
        scoring = "generation" if lacking == rows[0].conversation.location else "likelihood"
    if scoring == "likelihood" and lacking is not None:
        raise UserError(f'Task {task.task.name!r}: {lacking} has no "options" to choose from. Add a list of them.')
    return replace(task.task, scoring=scoring, metric=task.metric)


def predict(
    loaded: LoadedModel,
    name: str,
    rows: Sequence[PromptRow],
    output: Path | None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Writes one JSON object a row, in order: to a file, which appears when all is done, or to standard output.

    Args:
        loaded: The model.
        name: The task.
        rows: What to answer.
        output: The file.
        progress: Called with the task's name, and the rows done and to do.

    Raises:
        UserError: A prompt is too long for the model, or the file can't be written.
    """
    deployed = loaded.deployment.tasks[name]
    task = answerable(deployed, rows)
    renderer = Renderer(loaded.tokenizer, name)
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(name, done, len(rows))

    with loaded.task(name), _opened(output) as file:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            tokens = tokenize(renderer, part)
            _check_lengths(loaded, task, part, tokens)
            choose = task.scoring == "likelihood"
            answers = (
                _choose(loaded, part, tokens, count) if choose else _generate(loaded, deployed, part, tokens, count)
            )
            for described in _described(part, answers, task):
                file.write(to_json(described) + b"\n")
            file.flush()


def _choose(
    loaded: LoadedModel, rows: Sequence[PromptRow], tokens: Sequence[PromptTokens], count: Callable[[int], None]
) -> list[dict[str, object]]:
    found = option_log_likelihoods(
        loaded.model,
        [item.prompt_ids for item in tokens],
        [item.option_ids for item in tokens],
        token_budget=loaded.deployment.options.eval_micro_batch_tokens,
        on_batch=count,
    )
    answers: list[dict[str, object]] = []
    for row, values in zip(rows, found, strict=True):
        options = row.conversation.options or ()
        best = options[int(np.argmax(values))]
        likelihoods = dict(zip(options, values, strict=True))
        answers.append({"prediction": best, "answer": best, "log_likelihoods": likelihoods})
    return answers


def _generate(
    loaded: LoadedModel,
    deployed: DeployedTask,
    rows: Sequence[PromptRow],
    tokens: Sequence[PromptTokens],
    count: Callable[[int], None],
) -> list[dict[str, object]]:
    task, tokenizer = deployed.task, loaded.tokenizer
    found = generate_answers(
        loaded.model,
        [item.prompt_ids for item in tokens],
        max_new_tokens=task.max_new_tokens,
        stops=stop_tokens(loaded.model, tokenizer, [as_example(item.answer_ids) for item in tokens]),
        token_budget=loaded.deployment.options.eval_micro_batch_tokens,
        on_batch=count,
    )
    texts = tokenizer.batch_decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [
        {
            "prediction": text,
            "answer": extract_answer(
                text, pattern=task.answer_pattern, options=row.conversation.options, multiline=deployed.multiline
            ),
            "complete": len(ids) < task.max_new_tokens,
        }
        for row, text, ids in zip(rows, texts, found, strict=True)
    ]


def as_example(answer_ids: Sequence[int]) -> TokenizedExample:
    """An answer alone, of which the last token tells the end of turn."""
    return TokenizedExample(np.array(answer_ids, dtype=np.int32), np.ones(len(answer_ids), dtype=np.bool_))


def _described(
    rows: Sequence[PromptRow], answers: Sequence[dict[str, object]], task: Task
) -> Iterator[dict[str, object]]:
    """The objects to write, with scores where rows have a right answer."""
    known = [(row, answer) for row, answer in zip(rows, answers, strict=True) if row.reference is not None]
    scores = iter(
        score_answers(
            task.metric,
            [str(answer["answer"]) for _, answer in known],
            [str(row.reference) for row, _ in known],
            [row.conversation.options for row, _ in known],
        ).per_example
        if known
        else ()
    )
    for row, answer in zip(rows, answers, strict=True):
        described = {"prompt": row.conversation.prompt, **answer}
        if row.reference is not None:
            described |= {"reference": row.reference, "score": next(scores)}
        yield described | {"location": row.conversation.location}


def _check_lengths(loaded: LoadedModel, task: Task, rows: Sequence[PromptRow], tokens: Sequence[PromptTokens]) -> None:
    limit = max_positions(loaded)
    for row, item in zip(rows, tokens, strict=True):
        longest = max(map(len, item.option_ids), default=task.max_new_tokens)
        if limit is not None and len(item.prompt_ids) + longest > limit:
            raise UserError(
                f"Task {task.name!r}: {row.conversation.location} has a prompt of {len(item.prompt_ids)} tokens and "
                f"needs {longest} for the answer, and the model has {limit} positions. Shorten it."
            )


def max_positions(loaded: LoadedModel) -> int | None:
    """How many tokens the model takes, if it says so."""
    limit: int | None = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return limit


@contextmanager
def _opened(path: Path | None) -> Iterator[BinaryIO]:
    if path is None:
        yield sys.stdout.buffer
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
