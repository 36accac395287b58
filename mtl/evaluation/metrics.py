"""Task metrics: every score in [0, 1], higher is better, computed by the library that the field cites for it.

The libraries are imported where they are used, so that naming a metric costs nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from mtl.errors import UserError
from mtl.evaluation.answers import normalize

Options = Sequence[Sequence[str] | None]
CJK = r"\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


class Scores(NamedTuple):
    """A metric's result: scores of the corpus by name, and the metric of each example alone."""

    corpus: dict[str, float]
    per_example: list[float]


def check_metric(name: str) -> None:
    """Refuses a metric that does not exist.

    Raises:
        UserError: Lists the names.
    """
    if name not in METRICS:
        raise UserError(f"Unknown metric {name!r}. Choose one of: {', '.join(METRICS)}.")


def score_answers(
    metric: str, answers: Sequence[str], references: Sequence[str], options: Options | None = None
) -> Scores:
    """Scores answers against references. An empty answer is a wrong answer.

    Args:
        metric: A key of ``METRICS``.
        answers: One per example.
        references: One per example, not empty.
        options: What each example's answer is chosen from; ``None`` for a free answer.

    Raises:
        UserError: The metric does not exist.
    """
    check_metric(metric)
    return METRICS[metric](answers, references, options or [None] * len(references))


def trivial_score(metric: str, references: Sequence[str], options: Options, majority: str | None) -> float | None:
    """What the metric gives without looking at the prompt.

    That is the score of always answering ``majority``; without one, the expected score of a uniform guess among each
    example's options; ``None`` for free answers.
    """
    if metric == "none":
        return None
    if majority is not None:
        return score_answers(metric, [majority] * len(references), references, options).corpus[metric]
    chances = [
        choices.count(reference) / len(choices)
        for reference, choices in zip(references, options, strict=True)
        if choices is not None
    ]
    return sum(chances) / len(chances) if len(chances) == len(references) else None


def _accuracy(answers: Sequence[str], references: Sequence[str], options: Options) -> Scores:
    """Share of right answers; with one set of labels for all examples also macro-F1 over the labels that occur.

    Options are compared exactly, since they may differ only in case or punctuation; free answers are normalized.
    """
    chosen = [text if choices else normalize(text) for text, choices in zip(answers, options, strict=True)]
    right = [text if choices else normalize(text) for text, choices in zip(references, options, strict=True)]
    correct = [float(a == b) for a, b in zip(chosen, right, strict=True)]
    corpus = {"accuracy": sum(correct) / len(correct)}
    if options[0] is not None and all(choices == options[0] for choices in options):
        from sklearn.metrics import f1_score

        corpus["macro_f1"] = float(
            f1_score(right, chosen, labels=sorted(set(right)), average="macro", zero_division=0.0)
        )
    return Scores(corpus, correct)


def _exact_match(answers: Sequence[str], references: Sequence[str], options: Options) -> Scores:
    """Share of answers equal to the reference after :func:`normalize`."""
    correct = [float(normalize(a) == normalize(b)) for a, b in zip(answers, references, strict=True)]
    return Scores({"exact_match": sum(correct) / len(correct)}, correct)


def _entity_f1(answers: Sequence[str], references: Sequence[str], options: Options) -> Scores:
    """Micro-F1 over the multisets of (entity, type) pairs of lists like ``Ann = PERSON; Oslo = LOCATION``."""
    found, right = [parse_entities(text) for text in answers], [parse_entities(text) for text in references]
    per_example = [_micro_f1([a], [b]) for a, b in zip(found, right, strict=True)]
    return Scores({"entity_f1": _micro_f1(found, right)}, per_example)


def parse_entities(text: str) -> set[tuple[str, str, int]]:
    """The (entity, type) pairs of a list, each numbered among its equals, so that sets count like multisets.

    ``none`` is the empty list. Whatever has no type, an empty text included, counts as an entity of no type: a wrong
    one, for no reference has it.
    """
    if normalize(text) == "none":
        return set()
    parts = [piece.rpartition("=") for piece in text.split(";") if piece.strip()] or [("", "", text)]
    pairs = [(normalize(left), normalize(right)) if equals else (normalize(right), "") for left, equals, right in parts]
    counts: Counter[tuple[str, str]] = Counter()
    numbered = set()
    for pair in pairs:
        numbered.add((*pair, counts[pair]))
        counts[pair] += 1
    return numbered


def _micro_f1(found: Sequence[set[tuple[str, str, int]]], right: Sequence[set[tuple[str, str, int]]]) -> float:
    from sklearn.metrics import f1_score

    # True negatives do not enter F1, so the cells of the indicator matrices that are 0 in both can be left out.
    cells = [(pair in b, pair in a) for a, b in zip(found, right, strict=True) for pair in a | b]
    if not cells:
        return 1.0
    is_right, is_found = zip(*cells, strict=True)
    return float(f1_score(is_right, is_found, zero_division=0.0))


def _translation(answers: Sequence[str], references: Sequence[str], options: Options, *, primary: str) -> Scores:
    """Corpus BLEU and chrF of sacreBLEU, divided by 100 (Post, WMT 2018; Popovic, WMT 2015).

    Chinese references are tokenized by character (``zh``): sacreBLEU's default would see each sentence as one word.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    text = "".join(references)
    tokenizer = "zh" if 2 * len(re.findall(f"[{CJK}]", text)) > len(text) else None
    # Effective order only changes sentences too short for 4-grams; sacreBLEU keeps it out of corpus scores.
    corpus = {"bleu": BLEU(tokenize=tokenizer), "chrf": CHRF()}
    sentence = BLEU(tokenize=tokenizer, effective_order=True) if primary == "bleu" else CHRF()
    # A perfect BLEU comes out as 100.00000000000004.
    return Scores(
        {name: min(1.0, metric.corpus_score(answers, [references]).score / 100) for name, metric in corpus.items()},
        [min(1.0, sentence.sentence_score(a, [b]).score / 100) for a, b in zip(answers, references, strict=True)],
    )


class _WordTokenizer:
    """Words in lower case; each Chinese or Japanese character is a word.

    Equals ``rouge_score``'s own tokenizer (without stemming) on ASCII; that one drops every other character.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"(?=[{CJK}])\w|[^\W_{CJK}]+", unicodedata.normalize("NFC", text).lower())


def _rouge(answers: Sequence[str], references: Sequence[str], options: Options, *, primary: str) -> Scores:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures, averaged over examples (Lin, 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, tokenizer=_WordTokenizer())
    scores = [scorer.score(b, a) for a, b in zip(answers, references, strict=True)]
    per_example = {name: [float(score[name].fmeasure) for score in scores] for name in names}
    return Scores({name: sum(values) / len(values) for name, values in per_example.items()}, per_example[primary])


def _phoneme_accuracy(answers: Sequence[str], references: Sequence[str], options: Options) -> Scores:
    """``max(0, 1 - PER)``, where PER is the edit distance over space-separated phonemes per reference phoneme."""
    from jiwer import wer

    found, right = [normalize(text) for text in answers], [normalize(text) for text in references]
    per_example = [max(0.0, 1.0 - float(wer(b, a))) for a, b in zip(found, right, strict=True)]
    return Scores({"phoneme_accuracy": max(0.0, 1.0 - float(wer(right, found)))}, per_example)


def _none(answers: Sequence[str], references: Sequence[str], options: Options) -> Scores:
    return Scores({}, [])


METRICS: dict[str, Callable[[Sequence[str], Sequence[str], Options], Scores]] = {
    "accuracy": _accuracy,
    "exact_match": _exact_match,
    "entity_f1": _entity_f1,
    "bleu": partial(_translation, primary="bleu"),
    "chrf": partial(_translation, primary="chrf"),
    "rouge1": partial(_rouge, primary="rouge1"),
    "rouge2": partial(_rouge, primary="rouge2"),
    "rougeL": partial(_rouge, primary="rougeL"),
    "phoneme_accuracy": _phoneme_accuracy,
    "none": _none,
}
