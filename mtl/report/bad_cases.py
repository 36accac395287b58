"""The test examples that a comparison does worst on, and what is visibly wrong with the answers."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from math import inf, isfinite, isnan, nan
from statistics import fmean
from typing import TYPE_CHECKING

from mtl.evaluation.answers import normalize

if TYPE_CHECKING:
    from mtl.evaluation.results import Prediction

MIN_REFERENCES = 10  # fewer say little of what form all answers should have
EXAMPLES_PER_LABEL = 5
MIN_ECHO_BYTES = 20  # of UTF-8: 20 Latin letters, 7 Chinese characters
LOOP = re.compile(r"(.{1,200}?)\1{2,}")
MIN_LOOP = 8  # characters; 1000 is no loop
LETTERS = ("Lu", "Ll", "Lt", "Lo")  # without the modifier letters, which several scripts share
Shape = Callable[[str], bool]


class Flag(StrEnum):
    """What the texts alone show to be wrong with an answer."""

    EMPTY = "empty"
    TRUNCATED = "truncated"
    WRONG_FORMAT = "wrong format"
    OTHER_SCRIPT = "other script"
    REPEATS = "repeats itself"
    ECHOES = "echoes the prompt"


@dataclass(frozen=True)
class StrategyAnswer:
    """What a strategy answers to one example.

    Args:
        answer: What was scored, of the strategy's first run.
        prediction: That run's text as it came.
        flags: What is wrong with these two.
        score: Mean over the strategy's runs, in [0, 1].
        loss: Mean over its runs [nats per target token]; infinite where a run's is not finite, NaN if not known.
        num_right: Its runs with a score of 1.
        num_runs: All its runs.
    """

    answer: str
    prediction: str
    flags: Sequence[Flag]
    score: float
    loss: float
    num_right: int
    num_runs: int


@dataclass(frozen=True)
class Case:
    """One test example, with the answers of all strategies.

    Args:
        task: Its task.
        location: File and line.
        prompt: What was asked.
        reference: The right answer, as the data have it.
        answers: By strategy.
        score: Mean over the strategies, in [0, 1].
        loss: Mean over the strategies [nats per target token]; infinite where a run's is not finite, NaN if not known.
        score_rank: Its place among the task's lowest scores, from 1; None if it is none of them.
        loss_rank: Its place among the task's highest losses.
        disputed: Whether all runs, and there are several, agree on one wrong answer, which hints at label noise.
    """

    task: str
    location: str
    prompt: str
    reference: str
    answers: Mapping[str, StrategyAnswer]
    score: float
    loss: float
    score_rank: int | None
    loss_rank: int | None
    disputed: bool


def worst_cases(task: str, predictions: Mapping[str, Sequence[Sequence[Prediction]]], k: int) -> list[Case]:
    """The ``k`` examples of the highest loss per target token and the ``k`` of the lowest score, each once.

    Losses and scores are averaged over the runs of a strategy, then over the strategies. Examples of equal score are
    in the order of their losses, and the reverse; one that every run has right is not among the lowest scores. Where
    losses are not known, there are only those of the lowest score.

    Args:
        task: Name of the task.
        predictions: Of each run of each strategy, on the same examples in the same order.
        k: Examples of each kind.

    Returns:
        Those of high loss, the highest first, then the others of low score.
    """
    columns = [zip(*runs, strict=True) for runs in predictions.values()]
    examples = [dict(zip(predictions, row, strict=True)) for row in zip(*columns, strict=True)]
    losses = [fmean(fmean(map(_loss, runs)) for runs in example.values()) for example in examples]
    scores = [fmean(fmean(run.score for run in runs) for runs in example.values()) for example in examples]
    order = range(len(examples))
    known = [] if any(map(isnan, losses)) else order
    by_loss = sorted(known, key=lambda i: (-losses[i], scores[i]))[:k]
    by_score = sorted((i for i in order if scores[i] < 1), key=lambda i: (scores[i], -losses[i] if known else 0))[:k]
    loss_ranks = {i: rank for rank, i in enumerate(by_loss, start=1)}
    score_ranks = {i: rank for rank, i in enumerate(by_score, start=1)}
    shapes = _shapes([next(iter(example.values()))[0].reference for example in examples])
    cases = []
    for i in {**loss_ranks, **score_ranks}:
        first = next(iter(examples[i].values()))[0]
        cases.append(
            Case(
                task=task,
                location=first.location,
                prompt=first.prompt,
                reference=first.reference,
                answers={name: _strategy_answer(runs, shapes) for name, runs in examples[i].items()},
                score=scores[i],
                loss=losses[i],
                score_rank=score_ranks.get(i),
                loss_rank=loss_ranks.get(i),
                disputed=_disputed([run for runs in examples[i].values() for run in runs]),
            )
        )
    return cases


def _strategy_answer(runs: Sequence[Prediction], shapes: Sequence[Shape]) -> StrategyAnswer:
    return StrategyAnswer(
        answer=runs[0].answer,
        prediction=runs[0].prediction,
        flags=list(_flags(runs[0], shapes)),
        score=fmean(run.score for run in runs),
        loss=fmean(map(_loss, runs)),
        num_right=sum(run.score >= 1 for run in runs),
        num_runs=len(runs),
    )


def _loss(run: Prediction) -> float:
    if run.num_targets == 0:
        return nan  # not known: a file by other programs
    # A file of predictions has null for a loss that is not finite.
    return run.loss / run.num_targets if run.loss is not None and isfinite(run.loss) else inf


def _disputed(runs: Sequence[Prediction]) -> bool:
    answers = {normalize(run.answer) for run in runs}
    return len(runs) > 1 and len(answers) == 1 and answers != {""} and all(run.score < 1 for run in runs)


def _flags(run: Prediction, shapes: Sequence[Shape]) -> Iterator[Flag]:
    if not _is_visible(run.answer):
        yield Flag.EMPTY
    elif not all(shape(run.answer) for shape in shapes):
        yield Flag.WRONG_FORMAT
    if not run.complete:
        yield Flag.TRUNCATED
    if _is_in_other_script(run.answer, run.reference):
        yield Flag.OTHER_SCRIPT
    if _is_loop(run.prediction) and not _is_loop(run.reference):
        yield Flag.REPEATS
    if _is_echo(run):
        yield Flag.ECHOES


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(character)[0] not in "CZ" for character in text)


def _shapes(references: Sequence[str]) -> list[Shape]:
    """The forms that all references have, and so every answer should: numbers, JSON, entity lists, one of few labels.

    References are labels if there are at least two, each comes more than once, and five times on average.
    """
    if len(references) < MIN_REFERENCES:
        return []
    shapes: list[Shape] = [shape for shape in (_is_number, _is_json) if all(map(shape, references))]
    if all(map(_is_entity_list, references)) and any("=" in reference for reference in references):
        return [*shapes, _is_entity_list]
    labels = Counter(map(normalize, references))
    if 1 < len(labels) <= len(references) / EXAMPLES_PER_LABEL and min(labels.values()) > 1:
        shapes.append(lambda answer: normalize(answer) in labels)
    return shapes


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.,]*\d ?%?", normalize(text)) is not None


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_entity_list(text: str) -> bool:
    parts = [part for part in text.split(";") if part.strip()]
    is_typed = bool(parts) and all(re.fullmatch(r"[^=]*[^=\s]\s*=\s*\w+\s*", part) for part in parts)
    return is_typed or normalize(text) == "none"


def _is_in_other_script(answer: str, reference: str) -> bool:
    """Whether most letters of the answer are of a script of which the reference has none."""
    found, right = _scripts(answer), _scripts(reference)
    return bool(found and right) and found.most_common(1)[0][0] not in right


def _scripts(text: str) -> Counter[str]:
    """How many letters of each script: the first word of a letter's Unicode name, such as LATIN, CJK or ARABIC."""
    scripts = map(_script, unicodedata.normalize("NFKC", text))
    return Counter(script for script in scripts if script)


@lru_cache(maxsize=65536)
def _script(character: str) -> str | None:
    if unicodedata.category(character) not in LETTERS:
        return None
    return re.split("[ -]", unicodedata.name(character, ""))[0]


def _is_loop(text: str) -> bool:
    """Whether half of the text or more is one piece three or more times in a row."""
    single_spaced = " ".join(text.split())
    longest = max((len(match.group()) for match in LOOP.finditer(single_spaced)), default=0)
    return longest >= max(MIN_LOOP, len(single_spaced) / 2)


def _is_echo(run: Prediction) -> bool:
    """Whether a line of the prompt comes back, or the answer is a part of the prompt, and the reference is not so."""
    text, answer, reference = normalize(run.prediction), normalize(run.answer), normalize(run.reference)
    lines = [line for line in map(normalize, run.prompt.splitlines()) if _is_long(line)]
    prompt = normalize(run.prompt)
    is_part = _is_long(answer) and answer in prompt and reference not in prompt
    return is_part or any(line in text and line not in reference for line in lines)


def _is_long(text: str) -> bool:
    return len(text.encode("utf-8", "surrogatepass")) >= MIN_ECHO_BYTES
