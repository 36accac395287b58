from __future__ import annotations

from typing import Any

import pytest

from mtl.samplers import Specified

NAMES = ["a", "情感", "c"]


@pytest.mark.parametrize(
    "probabilities", [{"情感": 0.5, "c": 0.25, "a": 0.25}, [1, 2, 1], {"a": 25, "情感": 50, "c": 25}]
)
def test_by_name_or_in_order_and_in_any_unit(probabilities: Any) -> None:
    sampler = Specified([10, 20, 30], probabilities, names=NAMES)
    assert sampler.probabilities == (0.25, 0.5, 0.25)
    assert sampler.counts(8) == [2, 4, 2]


def test_a_task_of_probability_0_is_never_seen() -> None:
    assert Specified([10, 20, 30], [0.5, 0, 0.5]).counts(1_000) == [500, 0, 500]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"probabilities": {"a": 1, "c": 1}},
            r"^probabilities: must name every task, found nothing for '情感'; add it$",
        ),
        ({"probabilities": {"a": 1, "b": 1}}, r"^probabilities: must name tasks of the run, found 'b'; the tasks are "),
        ({"probabilities": [0.5, 0.5]}, r"^probabilities: must be one for each of 3 tasks, found 2; "),
        ({"probabilities": [1, -1, 1]}, r"^probabilities: must be finite and not negative, found -1.0; "),
        ({"probabilities": [1, float("nan"), 1]}, r"^probabilities: must be finite and not negative, found nan; "),
        ({"probabilities": [0, 0, 0]}, r"^probabilities: must not all be 0, found \[0.0, 0.0, 0.0\]; "),
        ({"probabilities": {"a": 1}, "names": None}, r"^names: must be given to read probabilities by task name, "),
        ({"sizes": [1, 0, 1]}, r"^sizes: every task must have an example, found 0 at index 1; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Specified(**({"sizes": [1, 2, 3], "probabilities": [1, 1, 1], "names": NAMES} | arguments))
