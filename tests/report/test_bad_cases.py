from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from jinja2 import Environment, PackageLoader, StrictUndefined

from mtl.evaluation.results import Prediction
from mtl.report.bad_cases import Flag, worst_cases


def answered(answer, reference="yes", *, score=None, loss=1.0, num_targets=1, complete=True, text=None, prompt="Why?"):
    score = float(answer == reference) if score is None else score
    return Prediction(prompt, reference, text or answer, answer, score, "test.jsonl:1", loss, num_targets, complete)


def run_of(scores, losses=None, prefix="p"):
    losses = losses or [1.0] * len(scores)
    return [
        Prediction(f"{prefix}{i}", "right", "x", "x", score, f"test.jsonl:{i}", loss, 1, True)
        for i, (score, loss) in enumerate(zip(scores, losses, strict=True))
    ]


def prompts(cases, rank):
    ranked = sorted((getattr(case, rank), case.prompt) for case in cases if getattr(case, rank) is not None)
    assert [place for place, _ in ranked] == list(range(1, len(ranked) + 1))
    return [prompt for _, prompt in ranked]


def flags(answer, reference, others=(), **fields):
    """The flags of an answer whose task has these other references, too."""
    run = [answered(answer, reference, loss=9.0, score=0.5, **fields)]
    run += [answered(other, other, score=1.0) for other in others]
    (case,) = worst_cases("task", {"only": [run]}, 1)
    assert case.reference == reference
    return case.answers["only"].flags


def test_what_all_seeds_get_wrong_comes_before_what_one_does():
    seeds = [run_of([1, 0, 0, 1]), run_of([1, 0, 1, 1]), run_of([1, 0, 1, 1])]
    cases = worst_cases("task", {"only": seeds}, 4)
    assert prompts(cases, "score_rank") == ["p1", "p2"]
    by_prompt = {case.prompt: case for case in cases}
    assert by_prompt["p2"].score == pytest.approx(2 / 3)
    answer = by_prompt["p2"].answers["only"]
    assert (answer.num_right, answer.num_runs) == (2, 3)


def test_ties_of_score_are_in_the_order_of_loss():
    cases = worst_cases("task", {"only": [run_of([0, 0, 0, 0.5], [1, 3, 2, 9])]}, 3)
    assert prompts(cases, "score_rank") == ["p1", "p2", "p0"]
    assert prompts(cases, "loss_rank") == ["p3", "p1", "p2"]
    assert [case.prompt for case in cases] == ["p3", "p1", "p2", "p0"]  # each once


def test_ties_of_loss_are_in_the_order_of_score():
    cases = worst_cases("task", {"only": [run_of([0.5, 1, 0])]}, 3)
    assert prompts(cases, "loss_rank") == ["p2", "p0", "p1"]


def test_a_strategy_with_many_seeds_has_one_vote():
    many = [run_of([0.0, 0.2])] * 5
    few = [run_of([0.8, 0.4])]
    assert prompts(worst_cases("task", {"many": many, "few": few}, 2), "score_rank") == ["p1", "p0"]


def test_loss_is_per_target_token():
    long = answered("x", loss=10.0, num_targets=10, prompt="long")
    short = answered("x", loss=3.0, num_targets=1, prompt="short")
    cases = worst_cases("task", {"only": [[long, short]]}, 1)
    assert prompts(cases, "loss_rank") == ["short"]
    assert cases[0].loss == 3.0
    assert prompts(cases, "score_rank") == ["short"]


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_loss_that_is_not_finite_is_the_worst(loss):
    cases = worst_cases("task", {"only": [run_of([0, 0, 0], [5.0, loss, 1.0])]}, 2)
    assert prompts(cases, "loss_rank") == ["p1", "p0"]
    assert cases[0].loss == math.inf


def test_losses_that_are_not_known():
    """As in predictions by other programs."""
    cases = worst_cases("task", {"only": [[replace(item, num_targets=0) for item in run_of([0, 1, 0.5])]]}, 3)
    assert prompts(cases, "loss_rank") == []
    assert prompts(cases, "score_rank") == ["p0", "p2"]
    assert "loss not known · no. 1 by score: 0.00" in rendered(cases)[2]


def test_right_answers_are_never_the_worst_by_score():
    cases = worst_cases("task", {"only": [run_of([1, 1, 1])]}, 2)
    assert prompts(cases, "score_rank") == []
    assert len(cases) == 2


def test_few_examples_and_none_asked_for():
    assert len(worst_cases("task", {"only": [run_of([0])]}, 5)) == 1
    assert worst_cases("task", {"only": [run_of([0, 0])]}, 0) == []
    assert worst_cases("task", {"only": [[]]}, 5) == []


def test_equal_examples_stay_apart():
    run = [answered("no", loss=loss) for loss in (1.0, 2.0)]
    assert [case.loss for case in worst_cases("task", {"only": [run]}, 2)] == [2.0, 1.0]


def test_answers_are_those_of_the_first_seed_of_each_strategy():
    predictions = {
        "a": [[answered("no")], [answered("yes")]],
        "b": [[answered("perhaps", text="Perhaps.\n")]],
    }
    (case,) = worst_cases("task", predictions, 3)
    assert {name: item.answer for name, item in case.answers.items()} == {"a": "no", "b": "perhaps"}
    assert case.answers["b"].prediction == "Perhaps.\n"


def test_runs_of_other_lengths_are_a_defect():
    with pytest.raises(ValueError, match="shorter"):
        worst_cases("task", {"a": [run_of([0, 0])], "b": [run_of([0])]}, 1)


LABELS = ["positive", "negative", "neutral"] * 7
ENTITIES = ["Ann = PERSON", "none", "Oslo = LOCATION; EU = ORGANIZATION", "none"] * 4
NUMBERS = [str(17 * i) for i in range(20)]
OBJECTS = [json.dumps({"name": i}) for i in range(12)]
SENTENCES = [f"sentence number {i}" for i in range(20)]


@pytest.mark.parametrize(
    ("answer", "reference", "others", "wrong"),
    [
        ("maybe", "positive", LABELS, True),
        ("neutral", "positive", LABELS, False),
        ("Negative.", "positive", LABELS, False),  # as metrics see it
        ("maybe", "positive", LABELS[:6], False),  # too few to know
        ("another sentence", SENTENCES[0], SENTENCES, False),
        ("none", "none", ["none"] * 20, False),
        ("something", "none", ["none"] * 20, False),  # one label is no set
        ("Ann", "Ann = PERSON", ENTITIES, True),
        ("Ann, Oslo", "Ann = PERSON", ENTITIES, True),
        ("Bob = PERSON; ", "Ann = PERSON", ENTITIES, False),
        ("None", "Ann = PERSON", ENTITIES, False),
        ("a = 1 and b = 2", "Ann = PERSON", ENTITIES, True),
        ("maybe", "positive", [*LABELS, "mixed"], False),  # who knows what else there is
        ("forty", "42", NUMBERS, True),
        ("forty", "42", NUMBERS[:5], False),
        ("-1,000.5", "42", NUMBERS, False),
        ("四十", "42", NUMBERS, True),
        ('{"name": 1', OBJECTS[0], OBJECTS, True),
        ('{"other": 1}', OBJECTS[0], OBJECTS, False),
        ("[" * 100_000, OBJECTS[0], OBJECTS, True),
    ],
)
def test_wrong_format(answer, reference, others, wrong):
    assert (Flag.WRONG_FORMAT in flags(answer, reference, others)) == wrong


@pytest.mark.parametrize(
    ("answer", "reference", "other"),
    [
        ("Bonjour", "你好", True),
        ("你好", "hello", True),
        ("مرحبا", "hello", True),
        ("привет", "hello", True),
        ("hello", "Hello", False),
        ("\uff28\uff25\uff2c\uff2c\uff2f", "hello", False),  # full width
        ("東京に行く", "とうきょうにいく", True),  # mostly CJK, which the reference does not have
        ("とうきょうに行く", "東京に行く", False),
        ("用 GTK+ 记日志", "日志", False),
        ("GTK+ GNOME KDE 的", "日志", True),
        ("😀", "hello", False),  # no letters at all
        ("42", "四十二", False),
        ("café", "cafe\u0301", False),
    ],
)
def test_other_script(answer, reference, other):
    assert (Flag.OTHER_SCRIPT in flags(answer, reference)) == other


@pytest.mark.parametrize("answer", ["", "  \n", "\u200b\u200d", "\u3000"])
def test_empty(answer):
    assert flags(answer, "positive", LABELS) == [Flag.EMPTY]


def test_a_chance_emoji_is_not_empty():
    assert Flag.EMPTY not in flags("😀", "positive")


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("The cat sat. The cat sat. The cat sat. The c", True),
        ("no no no no no", True),
        ("Je suis: " + "programme de " * 5, True),
        ("\n\n\n\nouxouxouxoux", True),
        ("很好很好很好很好", True),
        ("aaaaaaaaaaaa", True),
        ("\n" * 100, False),
        ("1000", False),
        ("2000000", False),
        ("The cat sat. The dog sat. The cow sat.", False),
        ("bye bye", False),
        ("Berlin, Berlin, wir", False),
        ("It ended with a long enough sentence, then: ha ha ha.", False),
        ("SH AO R T CH EY N JH D", False),
    ],
)
def test_repeats_itself(text, loops):
    assert (Flag.REPEATS in flags("answer", "reference", text=text)) == loops


def test_a_repetition_that_is_asked_for():
    assert flags("ha ha ha ha!", "ha ha ha ha ha") == []


@pytest.mark.parametrize(
    ("answer", "reference", "echoes"),
    [
        ("Translate to French: the little house", "la petite maison", True),
        ("Sure! translate to french: THE LITTLE HOUSE\nla maison", "la petite maison", True),
        ("French: the little house", "la petite maison", True),
        ("the", "la petite maison", False),  # too short to tell
        ("la petite maison bleue et blanche", "la petite maison", False),
        ("the little house or so", "the little house", False),  # answers stand in the prompt
    ],
)
def test_echoes_the_prompt(answer, reference, echoes):
    prompt = "Answer.\nTranslate to French: the little house"
    assert (Flag.ECHOES in flags(answer, reference, prompt=prompt)) == echoes


@pytest.mark.parametrize("answer", ["longer than all of the others", "shorter than all of the others"])
def test_a_choice_from_the_prompt_is_no_echo(answer):
    prompt = "Choose one: shorter than all of the others / longer than all of the others"
    assert flags(answer, "longer than all of the others", prompt=prompt) == []


def test_a_line_that_is_to_be_copied():
    prompt = "Copy the second line.\nThe quick brown fox jumps\nover the lazy dog"
    assert flags("The quick brown fox jumps.", "The quick brown fox jumps", prompt=prompt) == []


def test_an_echo_in_chinese_is_shorter():
    assert Flag.ECHOES in flags("今天的天气怎么样", "很好", prompt="请回答 今天的天气怎么样")


def test_truncated():
    assert flags("an answer", "another", complete=False) == [Flag.TRUNCATED]
    assert flags("an answer", "another") == []


@pytest.mark.parametrize(
    ("answers", "disputed"),
    [
        ([["no"], ["No."]], True),
        ([["no", "no", "no"]], True),
        ([["no"]], False),  # one run agrees with itself
        ([["no"], ["perhaps"]], False),
        ([["no", "yes"], ["no"]], False),
        ([["yes"], ["yes"]], False),
        ([[""], [""]], False),
    ],
)
def test_all_runs_agree_on_another_answer(answers, disputed):
    predictions = {str(i): [[answered(answer)] for answer in runs] for i, runs in enumerate(answers)}
    (case,) = worst_cases("task", predictions, 1)
    assert case.disputed == disputed


def test_lone_surrogates_are_no_obstacle():
    assert flags("\ud83d broken", "whole", prompt="\ud83d" * 20) == []


def test_long_texts_take_no_time():
    nasty = ["ab" * 20_000, "".join(chr(97 + i * i % 26) for i in range(8_000)), "= " * 5_000, "a" * 20_000 + "b"]
    start = time.perf_counter()
    for text in nasty:
        flags(text, "Ann = PERSON", ENTITIES, text=text)
    assert time.perf_counter() - start < 5


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def rendered(cases):
    environment = Environment(loader=PackageLoader("mtl.report"), autoescape=True, undefined=StrictUndefined)
    source = "{% import 'bad_cases.html' as parts %}<style>{{ parts.style() }}</style>{{ parts.bad_cases(cases) }}"
    html = environment.from_string(source).render(cases=cases)
    parser = Tags()
    parser.feed(html)
    return html, parser.tags, re.sub(r"\s+", " ", " ".join(parser.text))


def test_texts_are_shown_as_text():
    nasty = "<script>alert(1)</script><img src=x onerror=alert(1)> & 情感 مرحبا 😀"
    predictions = {nasty: [[answered(nasty, nasty + "!", prompt=nasty, text=nasty + "\nmore")]]}
    html, tags, text = rendered(worst_cases("task <b>", predictions, 1))
    assert not {"script", "img", "b"} & set(tags)
    assert text.count(nasty) == 5
    assert "task <b>" in text
    assert "http" not in html


def test_what_a_case_shows():
    wrong = [answered("no", loss=5.0, complete=False), answered("yes", prompt="Easy?")]
    right = [answered("yes", loss=0.5), answered("yes", prompt="Easy?", loss=math.nan)]
    cases = worst_cases("first", {"equal": [wrong, right], "pcgrad": [wrong, wrong]}, 1)
    cases += worst_cases("Second", {"equal": [right[1:]], "pcgrad": [right[1:]]}, 1)
    _, _, text = rendered(cases)
    assert text.index("first : 2 examples") < text.index("Second : 1 examples")
    assert "truncated" in text
    assert "score 0.50, 1 of 2 runs right" in text
    assert "not finite" in text
    assert "no. 1 by score: 0.25" in text


def test_long_and_empty_texts():
    long = "z" * 12_345
    html, _, text = rendered(worst_cases("task", {"only": [[answered("", "yes", prompt=long)]]}, 1))
    assert "… 10,345 more characters" in text
    assert "(empty)" in text
    assert len(html) < 10_000


def test_texts_that_begin_with_a_line_end_keep_it():
    html, _, _ = rendered(worst_cases("task", {"only": [[answered("no", prompt="\nWhy?")]]}, 1))
    assert '<pre dir="auto">\n\nWhy?' in html  # a parser drops the first
