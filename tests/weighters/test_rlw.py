from __future__ import annotations

import torch

from mtl.interfaces import TaskFeedback
from mtl.weighters import RLW

FEEDBACK = TaskFeedback(0, [1], [4], torch.tensor([1.0]))


def drawn(weighter: RLW, num_steps: int) -> torch.Tensor:
    rows = []
    for _ in range(num_steps):
        rows.append(weighter.weights(None))
        weighter.update(FEEDBACK)
    return torch.stack(rows)


def test_weights_are_the_softmax_of_independent_normal_draws() -> None:
    logs = drawn(RLW(3, seed=1), 4_000).log()
    first, second = logs[:, 0] - logs[:, 1], logs[:, 1] - logs[:, 2]  # differences of normal draws
    assert abs(first.mean()) < 4 * (2 / 4_000) ** 0.5
    assert abs(first.var() - 2) < 0.2 and abs(second.var() - 2) < 0.2
    assert abs((first * second).mean() + 1) < 0.15


def test_expected_weight_is_1_and_steps_are_independent() -> None:
    rows = drawn(RLW(4, seed=2), 4_000)
    assert (rows.mean(dim=0) - 1).abs().max() < 0.06
    centered = rows[:, 0] - 1
    assert abs((centered[1:] * centered[:-1]).mean()) < 0.05 * centered.var()


def test_a_seed_has_its_own_sequence_whatever_else_draws() -> None:
    rows = drawn(RLW(3, seed=5), 6)
    weighter = RLW(3, seed=5)
    torch.manual_seed(0)
    other = []
    for _ in range(6):
        torch.rand(1)
        other.append(weighter.weights(None))
        weighter.update(FEEDBACK)
    assert torch.equal(rows, torch.stack(other))
    assert not torch.equal(rows, drawn(RLW(3, seed=6), 6))


def test_an_evaluation_draws_nothing() -> None:
    weighter = RLW(3)
    before = weighter.weights(None)
    weighter.update(TaskFeedback(0, (), (), torch.zeros(0), validation={0: {"loss": 1.0}}))
    assert torch.equal(weighter.weights(None), before)
