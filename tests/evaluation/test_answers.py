from __future__ import annotations

import pytest

from mtl.evaluation.answers import extract_answer, normalize

INFLECT = r"""\A\s*The .*? (?:is|are) ["'“‘]?([^\W\d_][\w-]*)"""  # noqa: RUF001


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("walked", "walked"),
        ("\n\n  walked \nand more", "walked"),
        ("", ""),
        ("  \n ", ""),
        ("你好。\n再见", "你好。"),
        ("👋🏽 hi", "👋🏽 hi"),
    ],
)
def test_without_a_pattern_the_first_line_counts(text, answer):
    assert extract_answer(text) == answer


def test_answers_of_several_lines_are_taken_whole():
    assert extract_answer(" a\n\nb \n", multiline=True) == "a\n\nb"


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"#### (\d+)", "1+1\n#### 2\nor\n#### 3", "3"),
        (r"\d+", "from 1 to 10", "10"),
        (r"\d+", "none at all\n7"[:11], "none at all"),
        (r"\w*", "abc!", "abc"),  # matches the empty end too
        (r"a(b)?", "a", ""),
        (INFLECT, "The past tense of 'slang' is \"slanged\".", "slanged"),
        (INFLECT, "The plural of the noun 'sand' is sandi.", "sandi"),
        (INFLECT, "slanged", "slanged"),
    ],
)
def test_a_pattern_gives_its_last_match(pattern, text, answer):
    assert extract_answer(text, pattern=pattern) == answer


@pytest.mark.parametrize(
    ("text", "options", "answer"),
    [
        ("Positive.", ["positive", "negative"], "positive"),
        ("The sentiment is positive.", ["positive", "negative"], "positive"),
        ("positive or negative", ["positive", "negative"], "positive or negative"),
        ("It will move less.", ["more or less", "less"], "less"),
        ("More or less", ["more or less", "less"], "more or less"),
        ("No, I know nothing", ["yes", "no"], "no"),
        ("I know nothing", ["yes", "no"], "I know nothing"),
        ("Apple", ["apple", "Apple"], "Apple"),
        ("the Apple", ["apple", "Apple"], "the Apple"),
        ("这句话的情感是正面的。", ["正面", "负面"], "正面"),
        ("😀!", ["😀", "😡"], "😀"),
        ("c++", ["c", "c++"], "c++"),
        ("", ["yes", "no"], ""),
    ],
)
def test_the_option_that_is_meant(text, options, answer):
    assert extract_answer(text, options=options) == answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Cat\tsat. ", "the cat sat"),
        ("“Straße”!", "strasse"),
        ('" x "', "x"),
        ("ﬁn１２", "fin12"),  # noqa: RUF001
        ("e\u0301te\u0301", "été"),
        ("你好！", "你好"),  # noqa: RUF001
        ("...", "..."),
        ("?", "?"),
        ("", ""),
        ("it's", "it's"),
    ],
)
def test_normal_form(text, normal):
    assert normalize(text) == normal
    assert normalize(normal) == normal
