from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

import mtl
from mtl.errors import UserError
from mtl.evaluation.metrics import METRICS, score_answers
from mtl.evaluation.resampling import higher_is_better, resampled_scores, sufficient_statistics
from mtl.evaluation.statistics import resample_examples

SCORED = [metric for metric in METRICS if metric != "none"]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    ".",
    "Ann",
    "=",
    "PERSON",
    ";",
    "none",
    "<b>&amp;</b>",
    "مرحبا",
    "بالعالم",
    "😀",
    "“x”",
    "猫坐",
]
CHINESE = ["猫坐在垫子上", "狗叫", "。", "下雨了"]
TRANSLATIONS = [
    json.loads(line)["completion"]
    for line in (Path(mtl.__file__).parent / "tasks/suite/translate_en_fr/test.jsonl").read_text("utf-8").splitlines()
][:100]


def statistics_of(metric, answers, references):
    scores = score_answers(metric, answers, references)
    return sufficient_statistics(metric, answers, references, scores.per_example), scores.corpus[metric]


def random_corpus(rng, words):
    """Right, half right, wrong and empty answers; few examples, so that n-gram orders without a match occur."""
    num_examples = rng.choice([1, 2, 5, 20])
    references = [" ".join(rng.choices(words, k=rng.randint(1, 10))) for _ in range(num_examples)]
    answers = [
        rng.choice([text, text[: len(text) // 2], " ".join(rng.choices(words, k=rng.randint(1, 10))), ""])
        for text in references
    ]
    return answers, references


@pytest.mark.parametrize("metric", SCORED)
@pytest.mark.parametrize("words", [WORDS, CHINESE], ids=["words", "chinese"])
def test_score_of_all_examples_is_the_score_of_the_evaluation(metric, words):
    rng = random.Random(0)
    for _ in range(60):
        statistics, expected = statistics_of(metric, *random_corpus(rng, words))
        assert statistics.total == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", SCORED)
def test_score_of_real_texts(metric):
    answers = [(text, text[len(text) // 3 :], TRANSLATIONS[i - 1])[i % 3] for i, text in enumerate(TRANSLATIONS)]
    statistics, expected = statistics_of(metric, answers, TRANSLATIONS)
    assert statistics.total == pytest.approx(expected, abs=1e-12)
    assert expected < 1


@pytest.mark.parametrize("metric", ["bleu", "chrf", "entity_f1", "phoneme_accuracy", "rougeL", "exact_match"])
def test_a_resample_is_scored_like_a_corpus_of_its_examples(metric):
    rng = random.Random(1)
    references = [" ".join(rng.choices(WORDS, k=8)) for _ in range(20)]
    answers = [" ".join(word if rng.random() < 0.7 else "x" for word in text.split()) for text in references]
    systems = [statistics_of(metric, texts, references)[0] for texts in (answers, references)]
    counts_RN = resample_examples(20, np.random.default_rng(0), 30)
    scores_RA = resampled_scores(counts_RN, systems)
    for counts_N, (score, perfect) in zip(counts_RN, scores_RA, strict=True):
        drawn = np.repeat(np.arange(20), counts_N)
        corpus = score_answers(metric, [answers[i] for i in drawn], [references[i] for i in drawn]).corpus
        assert score == pytest.approx(corpus[metric], abs=1e-12)
        assert perfect == pytest.approx(1)
    assert len(set(scores_RA[:, 0])) > 5


def test_bleu_smoothing_equals_sacrebleu_for_any_counts():
    rng = np.random.default_rng(0)
    totals = np.maximum(0, rng.integers(0, 12, size=(500, 1)) - np.arange(4))
    matches = rng.binomial(totals, 0.3)
    matches = np.minimum.accumulate(matches, axis=1) * rng.integers(0, 2, size=(500, 1))
    sums = np.concatenate([totals[:, :1], rng.integers(1, 12, size=(500, 1)), matches, totals], axis=1)
    score = sufficient_statistics("bleu", ["a"], ["a"], [1.0]).score
    expected = [BLEU()._compute_score_from_stats(list(row)).score / 100 for row in sums.tolist()]
    np.testing.assert_allclose(score(sums.astype(float)), expected, atol=1e-12)
    assert 50 < np.count_nonzero(expected) < 450


def test_bleu_is_not_a_mean_over_examples():
    answers, references = ["a b c d e f g h", "x"], ["a b c d e f g h", "q r s"]
    statistics, _ = statistics_of("bleu", answers, references)
    assert statistics.total == pytest.approx(score_answers("bleu", answers, references).corpus["bleu"])
    assert abs(statistics.total - 0.5) > 0.1


def test_only_of_the_loss_lower_is_better():
    assert not higher_is_better("loss")
    assert all(higher_is_better(metric) for metric in METRICS)


def test_empty_answers_score_0():
    for metric in SCORED:
        statistics, expected = statistics_of(metric, ["", ""], ["ein Hund", "猫 坐"])
        assert statistics.total == expected == 0
        assert resampled_scores(np.array([[1, 0]]), [statistics]).tolist() == [[0]]


def test_nothing_to_find_and_nothing_found_is_right():
    statistics, expected = statistics_of("entity_f1", ["none", "none", "Ann = X"], ["none", "none", "none"])
    assert statistics.total == expected == 0
    assert resampled_scores(np.array([[1, 1, 0], [0, 1, 1]]), [statistics]).tolist() == [[1], [0]]


def test_one_example_tells_nothing_of_others():
    for metric in SCORED:
        statistics, _ = statistics_of(metric, ["a b"], ["a b"])
        counts_RN = resample_examples(1, np.random.default_rng(0), 5)
        assert np.isnan(resampled_scores(counts_RN, [statistics, statistics])).tolist() == [[True, True]] * 5


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(UserError, match=r"Unknown metric 'blue'\. Choose one of: accuracy"):
        sufficient_statistics("blue", ["a"], ["a"], [1.0])
    with pytest.raises(ValueError, match="'none' has no statistics"):
        sufficient_statistics("none", ["a"], ["a"], [1.0])
    with pytest.raises(ValueError, match="2, 1, 1 examples"):
        sufficient_statistics("bleu", ["a", "b"], ["a"], [1.0])
    systems = [sufficient_statistics("accuracy", ["a"] * n, ["a"] * n, [1.0] * n) for n in (2, 3)]
    with pytest.raises(ValueError, match="same shape"):
        resampled_scores(np.ones((1, 2), dtype=np.int64), systems)
