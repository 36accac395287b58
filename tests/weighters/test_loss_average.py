from __future__ import annotations

import json
import math

import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.weighters.loss_average import InitialLosses, LossAverage
from mtl.weighters.loss_floor import check_min_loss, floored


def losses(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_average_is_unbiased_from_the_first_loss_on() -> None:
    average = LossAverage(3, smoothing=0.9)
    for _ in range(3):
        average.add([0, 2], losses(2.0, 0.5))
    assert average.seen == [0, 2]
    torch.testing.assert_close(average.mean_T[[0, 2]], losses(2.0, 0.5), rtol=1e-14, atol=0)
    assert math.isnan(average.mean_T[1])


def test_average_weighs_losses_by_age_in_steps_with_the_task() -> None:
    average = LossAverage(2, smoothing=0.5)
    average.add([0], losses(4.0))
    average.add([1], losses(9.0))
    average.add([0], losses(1.0))
    assert average.mean_T.tolist() == [pytest.approx((0.25 * 4 + 0.5 * 1) / 0.75), 9.0]


def test_average_round_trips_bitwise() -> None:
    average, resumed = LossAverage(2, smoothing=0.7), LossAverage(2, smoothing=0.7)
    average.add([0, 1], losses(0.1, 0.3))
    resumed.load_state_dict(average.state_dict())
    for each in (average, resumed):
        each.add([1], losses(0.7))
    assert torch.equal(average.mean_T, resumed.mean_T)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_smoothing_is_below_1(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"^smoothing: must be in \[0, 1\), found {smoothing}; "):
        LossAverage(2, smoothing)


def test_initial_loss_is_that_before_training_or_the_first_one() -> None:
    initial = InitialLosses(4)
    initial.add(TaskFeedback(0, [], [], losses(), validation={0: {"loss": 3.0}, 1: {"score": 0.5}}))
    initial.add(TaskFeedback(0, [0, 1], [1, 1], losses(2.0, 1.5)))
    initial.add(
        TaskFeedback(9, [], [], losses(), validation={0: {"loss": 1.0}, 2: {"loss": 0.7}, 3: {"loss": math.nan}})
    )
    initial.add(TaskFeedback(9, [0, 1, 2], [1, 1, 1], losses(0.1, 0.2, 0.3)))
    assert initial.loss_T[:3].tolist() == [3.0, 1.5, 0.7]
    assert math.isnan(initial.loss_T[3])
    resumed = InitialLosses(4)
    resumed.load_state_dict(json.loads(json.dumps(initial.state_dict())))
    assert resumed.state_dict() == initial.state_dict() == {"losses": [3.0, 1.5, 0.7, None]}


def test_floor() -> None:
    found = floored(torch.tensor([0.0, 2.0], requires_grad=True), 0.05)
    assert found.tolist() == [0.05, 2.0] and found.dtype == torch.float64 and not found.requires_grad
    with pytest.raises(ValueError, match=r"^min_loss: must be above 0 nats per token, found 0.0; "):
        check_min_loss(0.0)
