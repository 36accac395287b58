"""Carries characters through the grammar of Hydra's overrides that it does not know.

``tasks.情感.path=数据`` is no override to Hydra: unquoted values are ASCII to it, and keys are letters, digits, ``_``
and ``-``. Other characters travel as escapes made of letters and digits.
"""

from __future__ import annotations

import re
from typing import Any

# Not allowed within a key: anything but these characters, and a digit that begins a name such as 3d.
IN_KEY = re.compile(r"[^\w.\-/@:]|(?:^|(?<=\.))\d(?=\d*[^.\d])", re.ASCII)
IN_VALUE = re.compile(r"[^\x00-\x7f]")
ESCAPE = re.compile(r"__u([0-9a-f]{1,6})__")


def escape(override: str) -> str:
    """Writes the characters that Hydra does not know as ``__u<code point>__``."""
    prefix, key, value = re.fullmatch(r"([+~]*)([^=]*)(.*)", override, re.DOTALL).groups()  # type: ignore[union-attr]
    return prefix + IN_KEY.sub(_code_point, key) + IN_VALUE.sub(_code_point, value)


def unescape(value: Any) -> Any:  # noqa: ANN401
    """Puts the characters back, in all keys and texts of nested plain data."""
    if isinstance(value, str):
        return ESCAPE.sub(lambda match: chr(int(match[1], 16)), value)
    if isinstance(value, dict):
        return {unescape(key): unescape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unescape(item) for item in value]
    return value


def _code_point(match: re.Match[str]) -> str:
    return f"__u{ord(match[0]):x}__"
