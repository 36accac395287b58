"""Equal and static weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.weighters import Equal, Static

FEEDBACK = TaskFeedback(0, [0, 2], [3, 1], torch.tensor([5.0, 0.1]))


def test_equal_weights_are_1() -> None:
    torch.testing.assert_close(Equal(3).weights(None), torch.ones(3, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([2, 0, 0.5], [2.0, 0.0, 0.5]), ({"c": 3, "情感 😀": 0.25}, [1.0, 0.25, 3.0]), ({}, [1.0, 1.0, 1.0])],
)
def test_static_weights_are_as_given(weights: Any, expected: list[float]) -> None:
    found = Static(weights, names=["a", "情感 😀", "c"]).weights(None)
    assert found.dtype == torch.float64
    assert found.tolist() == expected


@pytest.mark.parametrize("weighter", [Equal(3), Static([1.0, 2.0, 3.0])])
def test_fixed_weights_need_nothing_and_never_move(weighter: Any) -> None:
    before = weighter.weights(None).tolist()
    weighter.update(FEEDBACK)
    weighter.weights(FEEDBACK).mul_(7)  # the caller's copy
    assert weighter.weights(FEEDBACK).tolist() == before
    assert weighter.needs == frozenset()
    weighter.load_state_dict(weighter.state_dict())
    assert weighter.weights(None).tolist() == before


@pytest.mark.parametrize(
    ("weights", "names", "message"),
    [
        ([1.0, -0.5], ["a", "b"], r"^weights: must be finite and not negative, found -0.5 for task b; 0 switches"),
        ({"b": float("nan")}, ["a", "b"], r"^weights: must be finite and not negative, found nan for task b; "),
        ([float("inf")], None, r"^weights: must be finite and not negative, found inf for task 0; "),
        ([0.0, 0], ["a", "b"], r"^weights: must not all be 0, found \[0.0, 0.0\]; "),
        ({"bb": 1.0}, ["a", "b"], r"^weights: must name tasks of the run, found 'bb'; the tasks are \['a', 'b'\]"),
        ([1.0], ["a", "b"], r"^weights: must be one for each of 2 tasks, found 1; "),
        ({"a": 1.0}, None, r"^names: must be given to read weights by task name, found None; "),
    ],
)
def test_bad_weights_are_refused(weights: Any, names: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Static(weights, names=names)
