from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters import DTP
from mtl.weighters.dtp import focal_weights


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def evaluation(scores: dict[int, float | None]) -> TaskFeedback:
    results = {
        task: {"loss": 1.0} if score is None else {"loss": 1.0, "score": score} for task, score in scores.items()
    }
    return TaskFeedback(0, (), (), torch.empty(0, dtype=torch.float64), validation=results)


def after(weighter: DTP, *evaluations: dict[int, float | None]) -> Tensor:
    for scores in evaluations:
        weighter.update(evaluation(scores))
    return weighter.weights(None)


def test_golden_focal_weights() -> None:
    assert focal_weights(double(0.2, 0.5, 0.9), 2.0).tolist() == pytest.approx([1.030040, 0.173287, 0.001054], abs=5e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_weights_fall_to_0(gamma: float) -> None:
    weights = focal_weights(torch.linspace(0.01, 1, 100, dtype=torch.float64), gamma)
    assert (weights.diff() < 0).all()
    assert weights[-1] == 0


def test_weights_are_focal_up_to_floor_and_scale() -> None:
    weights = after(DTP(3, gamma=2.0, floor=0.2), {0: 0.2, 1: 0.5, 2: 0.9})
    focal = focal_weights(double(0.2, 0.5, 0.9), 2.0)
    torch.testing.assert_close(weights, 0.2 + 0.8 * 3 * focal / focal.sum(), rtol=1e-13, atol=0)


def test_scores_are_averaged_with_weight_alpha_on_the_newest() -> None:
    weighter = DTP(2, alpha=0.75)
    after(weighter, {0: 0.2, 1: 0.4}, {0: 0.6, 1: 0.4})
    kpi = (0.25 * 0.2 + 0.6) / 1.25
    assert weighter._kpis.mean_T.tolist() == pytest.approx([kpi, 0.4])
    newest = after(DTP(2, alpha=1.0), {0: 0.9, 1: 0.4}, {0: 0.2, 1: 0.4})
    assert torch.equal(newest, after(DTP(2), {0: 0.2, 1: 0.4}))


def test_the_weak_task_gains_when_and_only_when_it_is_weak() -> None:
    weighter = DTP(2, alpha=1.0)
    assert after(weighter, {0: 0.3, 1: 0.8})[0] > 1
    assert after(weighter, {0: 0.8, 1: 0.8}).tolist() == pytest.approx([1, 1], abs=1e-15)
    assert after(weighter, {0: 0.9, 1: 0.8})[0] < 1


def test_scores_of_0_and_1_are_bounded() -> None:
    weights = after(DTP(3), {0: 0.0, 1: 0.5, 2: 1.0})
    assert torch.equal(weights, after(DTP(3), {0: 0.05, 1: 0.5, 2: 1.0}))
    assert float(weights[2]) == pytest.approx(0.1)
    assert after(DTP(3), {0: 1.0, 1: 1.0, 2: 1.0}).tolist() == [1, 1, 1]


def test_tasks_without_scores_keep_their_weights() -> None:
    weighter = DTP(4)
    weights = after(weighter, {0: 0.2, 1: None, 2: 0.7})
    assert weights[[1, 3]].tolist() == [1, 1]
    assert float(weights.mean()) == pytest.approx(1, abs=1e-15)
    later = after(weighter, {0: 0.3, 3: 0.9})
    assert later[[1, 2]].tolist() == weights[[1, 2]].tolist()
    assert float(later.mean()) == pytest.approx(1, abs=1e-15)


def test_training_steps_and_losses_change_nothing() -> None:
    weighter = DTP(2)
    weights = after(weighter, {0: 0.2, 1: 0.7})
    weighter.update(TaskFeedback(1, [0, 1], [1, 1], double(9.0, 0.1)))
    assert torch.equal(after(weighter, {0: None, 1: None}, {}), weights)


def test_needs_scores() -> None:
    assert DTP(2).needs == {"validation", "scores"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, r"^gamma: must be at least 0, found -1.0; "),
        ({"gamma": math.nan}, r"^gamma: must be at least 0, found nan; "),
        ({"alpha": 0.0}, r"^alpha: must be in \(0, 1\], found 0.0; "),
        ({"min_score": 0.0}, r"^min_score: must be in \(0, 1\], found 0.0; "),
        ({"floor": 1.1}, r"^floor: must be a share in \[0, 1\], found 1.1; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DTP(2, **arguments)
