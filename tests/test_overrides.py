from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from mtl.overrides import escape, unescape

# A task's name may hold neither path separators nor what ends a key; '@' and ':' mean packages to Hydra.
NAMES = st.text(st.characters(exclude_characters="/\\=.@:", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1)


@given(NAMES.filter(lambda name: not name.isdigit() and not name.startswith("-")))
def test_any_task_name_passes_through_hydra(name):
    override = OverridesParser.create().parse_override(escape(f"tasks.{name}.path=x"))
    assert unescape(override.key_or_group) == f"tasks.{name}.path"


@given(st.text(st.characters(min_codepoint=128, exclude_categories=("Cc", "Cs"))))
def test_any_unquoted_text_passes_through_hydra(text):
    override = OverridesParser.create().parse_override(escape(f"tasks.mine.path=data/{text}.jsonl"))
    assert unescape(override.value()) == f"data/{text}.jsonl"


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "+a.b_c=x",
        "~sampler",
        "++tasks.my-task.labels=['a b', \"c\"]",
        "hydra/launcher=joblib",
        "a@b:c=d",
        "x.0=1",
    ],
)
def test_what_hydra_knows_stays_as_it_is(override):
    assert escape(override) == override


def test_keys_and_texts_of_nested_data_come_back():
    escaped = {escape("情.é"): [escape("x=😀"), 3, None, {"a": escape("y=ü")}]}
    assert str(escaped).isascii()
    assert unescape(escaped) == {"情.é": ["x=😀", 3, None, {"a": "y=ü"}]}
