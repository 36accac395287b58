"""A metric's per-example sufficient statistics: the counts whose sums over examples give the score of a whole test set.

With them a bootstrap resample of the examples is scored by adding up numbers, and a corpus metric such as BLEU stays
one: it is not a mean over examples (Koehn, EMNLP 2004).

Shape suffixes: N examples, K statistics, R resamples, A systems.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mtl.evaluation.answers import normalize
from mtl.evaluation.metrics import CJK, check_metric, parse_entities

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

Floats = NDArray[np.float64]
Score = Callable[[Floats], Floats]


@dataclass(frozen=True)
class SufficientStatistics:
    """One system's results on one test set, in the form that can be resampled.

    Args:
        values_NK: What each example adds to the sums.
        score: The score from sums [..., K] over examples -> [...].
    """

    values_NK: Floats
    score: Score

    @property
    def total(self) -> float:
        """The score of all examples."""
        return float(self.score(self.values_NK.sum(axis=0)))


def sufficient_statistics(
    metric: str, answers: Sequence[str], references: Sequence[str], scores: Sequence[float]
) -> SufficientStatistics:
    """The statistics whose score over all examples is that of :func:`mtl.evaluation.metrics.score_answers`.

    Args:
        metric: A key of ``mtl.evaluation.metrics.METRICS``.
        answers: What was scored, one per example.
        references: One per example, not empty.
        scores: The metric of each example alone; they are all that metrics that are means over examples need.

    Raises:
        UserError: The metric does not exist.
        ValueError: The metric is ``none``, which scores nothing, or the three are not equally long.
    """
    check_metric(metric)
    if metric == "none":
        raise ValueError("metric: 'none' has no statistics; resample the loss")
    if not len(answers) == len(references) == len(scores):
        raise ValueError(f"answers, references, scores: {len(answers)}, {len(references)}, {len(scores)} examples")
    if metric not in _CORPUS_METRICS:
        return SufficientStatistics(_columns(scores, [1.0] * len(scores)), _ratio)
    extract, score = _CORPUS_METRICS[metric]
    return SufficientStatistics(np.asarray(extract(answers, references), dtype=np.float64), score)


def higher_is_better(metric: str) -> bool:
    """True of every task metric, false of ``loss``."""
    return metric != "loss"


def resampled_scores(counts_RN: NDArray[np.int64], systems: Sequence[SufficientStatistics]) -> Floats:
    """Scores of every resample and system [R, A]; NaN where there is one example, which tells nothing of the others.

    Args:
        counts_RN: How often each example is in each resample, the same for all systems.
        systems: Statistics of one metric on the same examples in the same order.

    Raises:
        ValueError: The systems have other numbers of examples or other statistics.
    """
    values_NAK = np.stack([system.values_NK for system in systems], axis=1)
    num_examples, num_systems, num_statistics = values_NAK.shape
    if num_examples == 1:
        return np.full((len(counts_RN), num_systems), np.nan)
    # One product for all systems: integer counts would bypass BLAS.
    sums = counts_RN.astype(np.float64) @ values_NAK.reshape(num_examples, -1)
    return systems[0].score(sums.reshape(-1, num_systems, num_statistics))


def _columns(*columns: Sequence[float]) -> Floats:
    return np.array(columns, dtype=np.float64).T


def _ratio(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1])


@lru_cache(maxsize=4)  # the references' n-grams, which all systems of a task share
def _bleu(references: tuple[str, ...]) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    text = "".join(references)
    tokenizer = "zh" if 2 * len(re.findall(f"[{CJK}]", text)) > len(text) else None
    return BLEU(tokenize=tokenizer, references=[references])


@lru_cache(maxsize=4)
def _chrf(references: tuple[str, ...]) -> CHRF:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(references=[references])


def _bleu_counts(answers: Sequence[str], references: Sequence[str]) -> list[list[int]]:
    """Answer and reference length, and of each n-gram order the matches and the answer's n-grams."""
    counts: list[list[int]] = _bleu(tuple(references))._extract_corpus_statistics(answers, None)
    return counts


def _bleu_score(sums: Floats) -> Floats:
    """BLEU / 100 with sacreBLEU's ``exp`` smoothing: the k-th order without a match has the precision 2^-k / total.

    Without effective order, a corpus of answers too short for any 4-gram scores 0.
    """
    answer_length, reference_length, matches, totals = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:]
    matched = matches > 0
    with np.errstate(divide="ignore", invalid="ignore"):  # what is undefined is 0, below
        precisions = np.where(matched, matches, 0.5 ** np.cumsum(~matched, axis=-1)) / totals
        brevity = np.minimum(0.0, 1.0 - reference_length / answer_length)
        score = np.minimum(1.0, np.exp(brevity + np.log(precisions).mean(axis=-1)))
    return np.asarray(np.where(matched.any(axis=-1) & (totals > 0).all(axis=-1), score, 0.0))


def _chrf_counts(answers: Sequence[str], references: Sequence[str]) -> list[list[int]]:
    """Of each character n-gram order the answer's n-grams, the reference's, and the matches."""
    counts: list[list[int]] = _chrf(tuple(references))._extract_corpus_statistics(answers, None)
    return counts


def _chrf_score(sums: Floats) -> Floats:
    """chrF2 / 100: F of the mean precision and recall over the orders that occur on both sides."""
    in_answers, in_references, matches = (sums[..., i::3] for i in range(3))
    occurs = (in_answers > 0) & (in_references > 0)
    num_orders = np.maximum(1, occurs.sum(axis=-1))
    precision = np.divide(matches, in_answers, out=np.zeros_like(matches), where=occurs).sum(axis=-1) / num_orders
    recall = np.divide(matches, in_references, out=np.zeros_like(matches), where=occurs).sum(axis=-1) / num_orders
    weighted = 4.0 * precision + recall  # beta = 2
    return np.asarray(np.divide(5.0 * precision * recall, weighted, out=np.zeros_like(weighted), where=weighted > 0))


def _entity_counts(answers: Sequence[str], references: Sequence[str]) -> list[tuple[int, int]]:
    """True positives, and false ones of both kinds."""
    pairs = [(parse_entities(a), parse_entities(b)) for a, b in zip(answers, references, strict=True)]
    return [(len(found & right), len(found ^ right)) for found, right in pairs]


def _entity_score(sums: Floats) -> Floats:
    """Micro-F1; 1 where there is nothing to find and nothing found."""
    positives = 2.0 * sums[..., 0]
    everything = positives + sums[..., 1]
    return np.asarray(np.divide(positives, everything, out=np.ones_like(everything), where=everything > 0))


def _phoneme_counts(answers: Sequence[str], references: Sequence[str]) -> list[tuple[int, int]]:
    """Edits and reference phonemes."""
    from jiwer import process_words

    found = [process_words(normalize(b), normalize(a)) for a, b in zip(answers, references, strict=True)]
    return [
        (words.substitutions + words.deletions + words.insertions, words.hits + words.substitutions + words.deletions)
        for words in found
    ]


def _phoneme_score(sums: Floats) -> Floats:
    return np.maximum(0.0, 1.0 - _ratio(sums))


_CORPUS_METRICS: dict[str, tuple[Callable[[Sequence[str], Sequence[str]], Sequence[Sequence[int]]], Score]] = {
    "bleu": (_bleu_counts, _bleu_score),
    "chrf": (_chrf_counts, _chrf_score),
    "entity_f1": (_entity_counts, _entity_score),
    "phoneme_accuracy": (_phoneme_counts, _phoneme_score),
}
