from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters import ExcessDRO

NAMES = ["prose", "labels", "情感 😀"]
REFERENCES = {"prose": 3.0, "labels": 0.1, "情感 😀": 0.5}


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def after(weighter: ExcessDRO, losses: dict[int, float], num_steps: int = 1) -> Tensor:
    for step in range(num_steps):
        weighter.update(TaskFeedback(step, list(losses), [1] * len(losses), double(*losses.values())))
    return weighter.weights(None)


def test_golden_step_of_doremi() -> None:
    found = after(ExcessDRO(3, REFERENCES, NAMES, eta=1.0, floor=1e-4), {0: 3.0, 1: 0.6, 2: 1.5}) / 3
    assert found.tolist() == pytest.approx([0.186338, 0.307198, 0.506463], abs=5e-7)


def test_agrees_with_the_papers_rule_over_many_steps() -> None:
    weighter, alpha = ExcessDRO(3, REFERENCES, NAMES, eta=0.3, floor=0.01), torch.full((3,), 1 / 3).double()
    for row in (4 * torch.rand(60, 3, dtype=torch.float64)).tolist():
        excess = torch.relu(double(*row) - double(*REFERENCES.values()))
        alpha = 0.99 * torch.softmax(alpha.log() + 0.3 * excess, 0) + 0.01 / 3
        torch.testing.assert_close(after(weighter, dict(enumerate(row))), 3 * alpha, rtol=1e-12, atol=0)


def test_entropy_cancels_and_the_task_that_is_behind_gains() -> None:
    weights = after(ExcessDRO(3, REFERENCES, NAMES, eta=0.05), {0: 3.1, 1: 0.9, 2: 0.5}, num_steps=40)
    assert weights[1] > weights[0] > weights[2]


def test_a_memorised_task_gains_as_little_as_one_at_its_reference() -> None:
    weights = after(ExcessDRO(3, REFERENCES, NAMES), {0: 3.0, 1: 0.0, 2: 0.9}, num_steps=5)
    assert weights[0] == weights[1] < weights[2]


def test_floor_bounds_the_weights_and_leads_back_to_equal() -> None:
    weighter = ExcessDRO(3, REFERENCES, NAMES, floor=0.05)
    assert after(weighter, {0: 9.0, 1: 0.0, 2: 0.0}, num_steps=200).min() > 0.05
    weights = after(weighter, {0: 2.0, 1: 0.0, 2: 0.1}, num_steps=400)
    torch.testing.assert_close(weights, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_present_tasks_share_what_they_had() -> None:
    weighter = ExcessDRO(3, REFERENCES, NAMES, floor=0.1)
    before = after(weighter, {0: 5.0, 1: 1.0, 2: 0.4})
    found = after(weighter, {0: 3.0, 2: 2.5})
    assert found[1] == before[1]
    assert float(found.mean()) == pytest.approx(1, abs=1e-15)
    assert found[2] > before[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"references": {}, "names": NAMES}, r"^references: must give every task's loss, found none for 'prose'; "),
        (
            {"references": {"prose": 1.0}, "names": NAMES},
            r"^references: must give every task's loss, found none for 'la",
        ),
        (
            {"references": {**REFERENCES, "x": 1}, "names": NAMES},
            r"^references: must name tasks of the run, found 'x'; ",
        ),
        (
            {"references": {**REFERENCES, "labels": math.nan}, "names": NAMES},
            r"^references: must be finite and not neg",
        ),
        ({"references": 0.3, "eta": -1.0}, r"^eta: must be above 0, found -1.0; "),
        ({"references": 0.3, "floor": 1.5}, r"^floor: must be a share in \[0, 1\], found 1.5; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExcessDRO(3, **arguments)


def test_references_must_be_given() -> None:
    with pytest.raises(TypeError, match="references"):
        ExcessDRO(3)  # type: ignore[call-arg]
