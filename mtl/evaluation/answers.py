"""The answer within a generated text, and when two answers count as the same.

Nothing here sees the reference, and nothing depends on which model wrote the text: a model before training, which
answers in whole sentences, is read by the same rules as after.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

QUOTES = "\"'`‘’‚“”„«»‹›「」『』"  # noqa: RUF001
END_MARKS = ".,;:!?。、"  # their full-width forms become these in NFKC
# A letter or digit of a script that puts spaces between words; Chinese and Japanese need no word boundary.
WORD_CHARACTER = r"[^\W\u2e80-\U0010ffff]"


def extract_answer(
    text: str, *, pattern: str | None = None, options: Sequence[str] | None = None, multiline: bool = False
) -> str:
    """Finds the answer in a generated text.

    That is the last match of ``pattern`` in the text (its first group, if it has one); where nothing matches, the
    first line that is not empty. Where there are ``options``, the answer is the option that this text equals up to
    :func:`normalize`, or the only one that it mentions; if it mentions none or several, the text itself stands.

    Args:
        text: What the model wrote.
        pattern: Regular expression from the task.
        options: The answers to choose from.
        multiline: Take the whole text instead of its first line, for tasks whose answers have several lines.
    """
    answer = _match(text, pattern)
    if answer is None:
        answer = text if multiline else next((line for line in text.splitlines() if line.strip()), "")
    answer = answer.strip()
    return answer if options is None else _mentioned_option(answer, options)


def normalize(text: str) -> str:
    """The text in NFKC, case-folded, with single spaces, without quotes around it and punctuation at its end.

    A text of nothing but such marks keeps them.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.lstrip(QUOTES + " ").rstrip(QUOTES + END_MARKS + " ") or folded


def _match(text: str, pattern: str | None) -> str | None:
    found = [] if pattern is None else [match for match in re.finditer(pattern, text) if match.group()]
    if not found:
        return None
    return (found[-1].group(1) if found[-1].re.groups else found[-1].group()) or ""


def _mentioned_option(answer: str, options: Sequence[str]) -> str:
    text = normalize(answer)
    mentioned = [(name, option) for option in options if _mentions(text, name := normalize(option))]
    # "more or less" mentions "less" too; the longer option is meant.
    longest = [option for name, option in mentioned if not any(name != n and name in n for n, _ in mentioned)]
    return longest[0] if len(longest) == 1 else answer


def _mentions(text: str, option: str) -> bool:
    return re.search(rf"(?<!{WORD_CHARACTER}){re.escape(option)}(?!{WORD_CHARACTER})", text) is not None
