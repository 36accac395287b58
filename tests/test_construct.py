from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from mtl.construct import Maker, build, cut, did_you_mean, is_of_type
from mtl.errors import UserError


@dataclass
class Thing:
    name: str
    size: int
    ratio: float | None = None
    labels: Sequence[str] | None = None


class Lever:
    def __init__(self, sizes, temperature=1.0, targets=None):
        if temperature < 0:
            raise ValueError(f"temperature: must not be negative, found {temperature}; 1 is usual")
        self.sizes, self.temperature, self.targets = sizes, temperature, targets


def test_builds_what_fits():
    assert build(Thing, "things.a", {"size": 3, "ratio": 1, "labels": ["x"]}, name="a") == Thing("a", 3, 1, ["x"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "things.a.size must be given. Add things.a.size=<value>."),
        (3, "things.a=3: must be a mapping of options. Write things.a.<option>=<value>."),
        ({"size": 1, "ration": 2}, "things.a.ration: there is no such option. Did you mean ratio? There are: size, "),
        ({"size": 1, "name": "b"}, "things.a.name: there is no such option."),
        ({"size": "1"}, "things.a.size=1: must be a whole number. Correct the value."),
        ({"size": True}, "things.a.size=True: must be a whole number."),
        ({"size": 1, "ratio": "x"}, "things.a.ratio=x: must be a number or null."),
    ],
)
def test_refuses_what_does_not_fit(values, message):
    with pytest.raises(UserError) as caught:
        build(Thing, "things.a", values, name="a")
    assert str(caught.value).startswith(message)


def test_types_of_plain_data():
    assert is_of_type(1, float)
    assert is_of_type(None, int | None)
    assert is_of_type([1], Sequence[str])  # the inside is the class's own to check
    assert is_of_type(True, bool)
    assert not is_of_type(True, int)
    assert not is_of_type(1, bool)
    assert not is_of_type(1.0, int)


def test_nearest_word():
    assert did_you_mean("temprature", ["temperature", "max_size"]) == " Did you mean temperature?"
    assert did_you_mean("wights", ["weighter"]) == ""


def test_maker_gives_what_is_asked_for_and_cuts_mappings_to_the_tasks_at_hand():
    partial = functools.partial(Lever, temperature=2.0, targets={"a": 1, "b": 2})
    maker = Maker("sampler", partial, ("sizes", "names", "seed"), ["a", "b", "c"])
    made = maker(sizes=[1, 2], names=["b", "c"], seed=0)
    assert (made.sizes, made.temperature, made.targets) == ([1, 2], 2.0, {"b": 2})
    assert maker.name == "Lever"
    assert partial.keywords["targets"] == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": 1, "b": 2, "c": 3}, {"b": 2, "c": 3}),
        ([1, 2, 3], [2, 3]),
        ([1, 2], [1, 2]),
        (["c", "a", "b"], ["c", "b"]),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[5, 6], [8, 9]]),
        ([{"until": 1, "weights": {"a": 1, "b": 2}}] * 3, [{"until": 1, "weights": {"b": 2}}] * 3),
        ("abc", "abc"),
        ({}, {}),
        ([], []),
        (None, None),
    ],
)
def test_options_are_cut_to_the_tasks_at_hand(value, expected):
    assert cut(value, ["a", "b", "c"], ["b", "c"]) == expected


class Wrapper:
    def __init__(self, inner, factor=1.0, seed=0):
        self.inner, self.factor, self.seed = inner, factor, seed


def test_maker_makes_an_option_that_is_an_object_anew_each_time_and_gives_it_what_it_asks_for():
    inner = functools.partial(Lever, temperature=3.0)
    maker = Maker("sampler", functools.partial(Wrapper, inner=inner), ("sizes", "names", "seed"), ["a"])
    first, second = (maker(sizes=[1], names=["a"], seed=seed) for seed in (4, 5))
    assert (first.inner.sizes, first.inner.temperature) == ([1], 3.0)
    assert (first.seed, second.seed) == (4, 5)
    assert first.inner is not second.inner
    with pytest.raises(UserError, match=r"sampler\.inner\.temprature: there is no such option\. Did you mean temp"):
        Maker("sampler", functools.partial(Wrapper, inner=functools.partial(Lever, temprature=1)), ("sizes",), ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "sampler.temprature: there is no such option. Did you mean temperature? There are: temp"),
        ({"sizes": [1]}, "sampler.sizes: is set by the run and can't be set here. Remove it."),
        ({"temperature": -1}, "sampler.temperature: must not be negative, found -1; 1 is usual"),
        ({"temperature": "x"}, "sampler: Lever(temperature='x'): '<' not supported"),
    ],
)
def test_maker_refuses(options, message):
    with pytest.raises(UserError) as caught:
        Maker("sampler", functools.partial(Lever, **options), ("sizes",), ["a"])(sizes=[1])
    assert str(caught.value).startswith(message)
