from __future__ import annotations

import subprocess
import sys

import jiwer
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

from mtl.errors import UserError
from mtl.evaluation.metrics import METRICS, check_metric, parse_entities, score_answers, trivial_score

ANSWERS = ["the cat sat on the mat", "", "a dog barks at night", "Ein Hund"]
REFERENCES = ["the cat sat on a mat", "birds sing", "a dog barks at night", "ein großer Hund"]


def test_accuracy_and_macro_f1_of_labels():
    references = ["a", "a", "b", "b", "b"]
    answers = ["a", "b", "b", "b", "nonsense"]
    scores = score_answers("accuracy", answers, references, [("a", "b", "c")] * 5)
    assert scores.per_example == [1, 0, 1, 1, 0]
    # F1(a) = 2*1/(1+2) and F1(b) = 2*2/(3+3), both 2/3; c never occurs
    assert scores.corpus == pytest.approx({"accuracy": 0.6, "macro_f1": 2 / 3})
    assert scores.corpus["macro_f1"] == f1_score(references, answers, labels=["a", "b"], average="macro")


def test_options_are_compared_exactly_and_free_answers_leniently():
    options = [("apple", "Apple")] * 2
    assert score_answers("accuracy", ["apple", "Apple"], ["Apple", "apple"], options).corpus["accuracy"] == 0
    assert score_answers("accuracy", ["apple."], ["Apple"]).corpus == {"accuracy": 1}


def test_options_of_their_own_give_no_macro_f1():
    assert set(score_answers("accuracy", ["a", "c"], ["a", "d"], [("a", "b"), ("c", "d")]).corpus) == {"accuracy"}


def test_exact_match():
    scores = score_answers("exact_match", ["Paris.", "", "“巴黎”", "Rom"], ["paris", "x", "巴黎", "Roma"])
    assert scores.per_example == [1, 0, 1, 0]
    assert scores.corpus == {"exact_match": 0.5}


@pytest.mark.parametrize(
    ("text", "entities"),
    [
        ("none", set()),
        ("None.", set()),
        ("Ann = PERSON; Oslo = LOCATION", {("ann", "person", 0), ("oslo", "location", 0)}),
        ("Bank = ORG; bank=ORG;", {("bank", "org", 0), ("bank", "org", 1)}),
        ("a = b = X", {("a = b", "x", 0)}),
        ("just words", {("just words", "", 0)}),
        ("", {("", "", 0)}),
    ],
)
def test_entities_of_a_list(text, entities):
    assert parse_entities(text) == entities


@pytest.mark.parametrize(
    ("answers", "references", "f1"),
    [
        (["Ann = P"], ["Ann = P"], 1),
        (["Ann = P; Bob = P"], ["Ann = P; Oslo = L"], 0.5),  # 1 right, 1 too many, 1 missing
        (["Ann = P"], ["Ann = P; Ann = P"], 2 / 3),  # multisets: 1 right, 1 missing
        (["Ann = P; none"], ["none"], 0),
        (["none", "Ann = P"], ["none", "Ann = P"], 1),
        (["none", "none"], ["none", "none"], 1),
        (["", "none"], ["none", "none"], 0),  # an empty answer does not say that there is none
        (["", "Ann = P"], ["Bo = P", "Ann = P"], 0.5),  # and stands for one wrong entity
        (["小明 = 人名"], ["小明 = 人名"], 1),
    ],
)
def test_entity_f1(answers, references, f1):
    assert score_answers("entity_f1", answers, references).corpus == {"entity_f1": pytest.approx(f1)}


def test_entity_f1_of_each_example():
    scores = score_answers("entity_f1", ["none", "A = X", "A = X; B = Y"], ["none", "none", "A = X"])
    assert scores.per_example == pytest.approx([1, 0, 2 / 3])


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_translation_scores_are_sacrebleus(metric):
    scores = score_answers(metric, ANSWERS, REFERENCES)
    assert scores.corpus == {
        "bleu": sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score / 100,
        "chrf": sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score / 100,
    }
    assert scores.per_example[1] == 0
    assert scores.per_example[2] == pytest.approx(1)
    assert all(0 <= score <= 1 for score in scores.per_example)


def test_bleu_sees_the_characters_of_chinese():
    answers, references = ["我今天去北京看朋友。"], ["我明天去北京看朋友。"]
    assert score_answers("bleu", answers, references).corpus["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score / 100
    )
    assert score_answers("bleu", answers, references).corpus["bleu"] > 0.5


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_the_librarys_on_ascii(metric):
    answers = ["The cat_sat, on the mat!", "", "it's 3 dogs barking"]
    references = ["the cat sat on a mat", "birds sing", "It's 4 dogs barking loudly"]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = [scorer.score(b, a) for a, b in zip(answers, references, strict=True)]
    scores = score_answers(metric, answers, references)
    assert scores.per_example == [score[metric].fmeasure for score in expected]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert scores.corpus[name] == pytest.approx(sum(score[name].fmeasure for score in expected) / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("été à Nîmes", "été à Paris", 2 / 3),
        ("我爱北京", "我爱上海", 0.5),
        ("e\u0301te\u0301", "été", 1),
        ("étude", "étage", 0),
        ("。", "？", 0),  # noqa: RUF001
    ],
)
def test_rouge_keeps_what_is_not_ascii(answer, reference, f1):
    assert score_answers("rouge1", [answer], [reference]).corpus["rouge1"] == pytest.approx(f1)


def test_phoneme_accuracy_is_one_minus_error_rate_over_the_corpus():
    answers, references = ["B R AY D", "", "HH AH"], ["B R AY D", "K AE", "HH AH L OW"]
    scores = score_answers("phoneme_accuracy", answers, references)
    assert scores.corpus == {"phoneme_accuracy": pytest.approx(1 - 4 / 10)}
    assert scores.corpus["phoneme_accuracy"] == pytest.approx(1 - jiwer.wer(references, answers))
    assert scores.per_example == pytest.approx([1, 0, 0.5])


def test_phoneme_accuracy_is_never_negative():
    scores = score_answers("phoneme_accuracy", ["a whole sentence about it"], ["B"])
    assert scores.corpus == {"phoneme_accuracy": 0}
    assert scores.per_example == [0]


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "none"])
@pytest.mark.parametrize("answer", ["", "  ", "?!", "😀", "你好", "x;=;=", "\x00"])
def test_any_answer_gets_a_score_between_0_and_1(metric, answer):
    scores = score_answers(metric, [answer, "right 对"], ["right 对", "right 对"])
    assert scores.corpus[metric] < 1
    assert scores.per_example == [pytest.approx(scores.per_example[0]), pytest.approx(1)]
    assert all(0 <= score <= 1 for score in [*scores.corpus.values(), *scores.per_example])


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "none"])
def test_the_references_themselves_score_1(metric):
    references = ["Ann = PERSON; 北京 = LOCATION", "none of these words here"]
    assert score_answers(metric, references, references).corpus[metric] == pytest.approx(1)


def test_an_unknown_metric_is_refused_with_the_names():
    with pytest.raises(UserError, match=r"Unknown metric 'acuracy'\. Choose one of: accuracy, .*none\."):
        check_metric("acuracy")


def test_majority_scores_what_answering_it_always_would():
    options = [("a", "b")] * 4
    assert trivial_score("accuracy", ["a", "b", "a", "a"], options, "a") == 0.75
    assert trivial_score("exact_match", ["a", "b"], [None, None], "A") == 0.5


def test_chance_is_a_uniform_guess_among_the_options():
    assert trivial_score("accuracy", ["a", "x"], [("a", "b"), ("x", "y", "z")], None) == pytest.approx(5 / 12)


def test_free_answers_have_no_trivial_score():
    assert trivial_score("chrf", ["a"], [None], None) is None
    assert trivial_score("none", ["a"], [None], "a") is None


def test_naming_metrics_loads_no_library():
    code = (
        "import sys; from mtl.evaluation.metrics import check_metric; check_metric('bleu');"
        "print([m for m in ('torch', 'numpy', 'sklearn', 'sacrebleu', 'rouge_score', 'jiwer') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
