from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters import GroupDRO

NAMES = ["prose", "labels", "情感 😀"]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def feedback(losses: dict[int, float]) -> TaskFeedback:
    return TaskFeedback(0, list(losses), [1] * len(losses), double(*losses.values()))


def after(weighter: GroupDRO, losses: dict[int, float], num_steps: int = 1) -> Tensor:
    for _ in range(num_steps):
        weighter.update(feedback(losses))
    return weighter.weights(None)


def test_golden_step_of_the_paper() -> None:
    shares = after(GroupDRO(3, eta=0.01, floor=0.0), {0: 1.0, 1: 2.0, 2: 3.0}) / 3
    assert shares.tolist() == pytest.approx([0.330006, 0.333322, 0.336672], abs=5e-7)


def test_without_floor_it_is_the_softmax_of_the_summed_losses() -> None:
    weighter, losses = GroupDRO(3, eta=0.1, floor=0.0), 3 * torch.rand(40, 3, dtype=torch.float64)
    for row in losses.tolist():
        weighter.update(feedback(dict(enumerate(row))))
    torch.testing.assert_close(weighter.weights(None), 3 * torch.softmax(0.1 * losses.sum(0), 0), rtol=1e-12, atol=0)


def test_a_step_maximises_gain_minus_divergence() -> None:
    weighter = GroupDRO(3, eta=0.7, floor=0.0)
    before = after(weighter, {0: 1.2, 1: 0.3, 2: 0.8}) / 3
    found = after(weighter, {0: 0.1, 1: 2.0, 2: 0.4}) / 3

    def value(shares: Tensor) -> float:
        gain = 0.7 * shares @ double(0.1, 2.0, 0.4)
        return float(gain - (shares * (shares / before).log()).sum())

    others = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((500,))
    nearby = found + 1e-3 * (others - found)
    assert max(map(value, [*others, *nearby])) < value(found)


def test_floor_makes_the_weights_settle_where_the_docs_say() -> None:
    losses = {0: 3.0, 1: 0.4, 2: 1.5}
    weights = after(GroupDRO(3, eta=0.005, floor=0.005), losses, num_steps=4_000)
    levels = 1 / weights + double(*losses.values()) - 1  # c, at floor = eta
    assert float(levels.std()) < 0.02
    assert (weights[[0, 2, 1]].diff() < 0).all()


def test_raw_losses_chase_entropy_and_references_do_not() -> None:
    """The trap: prose at its entropy of 3 nats has nothing to gain, labels are 0.4 nats from theirs."""
    losses = {0: 3.0, 1: 0.5, 2: 0.2}
    raw = after(GroupDRO(3, floor=0.0), losses, num_steps=2_000)
    assert raw[0] > 2.99
    bounded = after(GroupDRO(3), losses, num_steps=2_000)
    assert bounded.min() > 0.3
    references = {"prose": 3.0, "labels": 0.1}
    relative = after(GroupDRO(3, NAMES, references=references), losses, num_steps=2_000)
    assert relative.argmax() == 1
    assert relative[0] < relative[2] < 1


def test_the_worst_task_gains_when_and_only_when_it_is_the_worst() -> None:
    weighter = GroupDRO(2, eta=0.05)
    rising = [float(after(weighter, {0: 2.0, 1: 1.0})[0]) for _ in range(30)]
    falling = [float(after(weighter, {0: 0.5, 1: 1.0})[0]) for _ in range(30)]
    assert all(a < b for a, b in pairwise([1.0, *rising]))
    assert all(a > b for a, b in pairwise([rising[-1], *falling]))


def test_one_reference_for_all_changes_nothing() -> None:
    losses = {0: 1.0, 1: 0.2, 2: 2.0}
    torch.testing.assert_close(after(GroupDRO(3, references=0.7), losses, 9), after(GroupDRO(3), losses, 9))


def test_present_tasks_share_what_they_had() -> None:
    weighter = GroupDRO(4, eta=0.5)
    before = after(weighter, {0: 1.0, 1: 2.0, 2: 0.5, 3: 0.0})
    found = after(weighter, {1: 0.1, 3: 2.0})
    assert found[[0, 2]].tolist() == before[[0, 2]].tolist()
    assert float(found[1] + found[3]) == pytest.approx(float(before[1] + before[3]), abs=1e-15)
    assert found[3] > before[3]
    assert after(weighter, {2: 9.0}).tolist() == found.tolist()  # alone there is nobody to take weight from


def test_huge_losses_do_not_overflow() -> None:
    weights = after(GroupDRO(3, eta=1.0), {0: 1e4, 1: 0.0, 2: 1e4}, num_steps=50)
    assert weights.isfinite().all()
    assert weights[1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": 0.0}, r"^eta: must be above 0, found 0.0; "),
        ({"eta": math.nan}, r"^eta: must be above 0, found nan; "),
        ({"floor": -0.1}, r"^floor: must be a share in \[0, 1\], found -0.1; "),
        ({"floor": math.nan}, r"^floor: must be a share in \[0, 1\], found nan; "),
        ({"references": -1.0}, r"^references: must be finite and not negative, found -1.0; "),
        (
            {"references": {"prose": math.inf}, "names": NAMES},
            r"^references: must be finite and not negative, found inf",
        ),
        ({"references": {"pros": 1.0}, "names": NAMES}, r"^references: must name tasks of the run, found 'pros'; "),
        ({"references": {"prose": 1.0}}, r"^names: must be given to read references by task name, found None; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupDRO(3, **arguments)
