"""GLS, log loss and UW-SO: weights by a rule on the step's own losses."""

from __future__ import annotations

import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.weighters import GLS, UWSO, LogLoss
from mtl.weighters.gls import gls_weights
from mtl.weighters.loss_rule import LossRule
from mtl.weighters.uwso import uwso_weights


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def feedback(losses: dict[int, float]) -> TaskFeedback:
    return TaskFeedback(0, list(losses), [1] * len(losses), double(*losses.values()))


def test_golden_gls_weights() -> None:
    assert gls_weights(double(0.1, 1, 4)).tolist() == pytest.approx([2.456021, 0.2456021, 0.0614005], abs=5e-7)


def test_gls_weights_are_the_gradient_of_the_geometric_mean() -> None:
    losses_M = double(0.3, 2.0, 0.7, 5.0).requires_grad_()
    (losses_M.prod() ** 0.25).backward()
    torch.testing.assert_close(gls_weights(losses_M.detach()), losses_M.grad, rtol=1e-13, atol=0)


def test_gls_weights_of_many_tasks_stay_finite() -> None:
    assert gls_weights(torch.full((5_000,), 0.05, dtype=torch.float64)).tolist() == pytest.approx([1 / 5_000] * 5_000)


@pytest.mark.parametrize(
    ("temperature", "printed"),
    [(1.0, ".9998 .0001 .0001"), (5.0, ".7648 .1264 .1088"), (float("inf"), ".3333 .3333 .3333")],
)
def test_golden_uwso_weights(temperature: float, printed: str) -> None:
    found = uwso_weights(double(0.1, 1, 4), temperature)
    assert found.tolist() == pytest.approx([float(value) for value in printed.split()], abs=5e-5)


@pytest.mark.parametrize("weighter", [GLS(3), LogLoss(3)])
def test_weights_are_inverse_to_the_current_losses(weighter: LossRule) -> None:
    found = weighter.weights(feedback({0: 0.1, 1: 1.0, 2: 4.0}))
    torch.testing.assert_close(found, double(10, 1, 0.25) * 3 / 11.25, rtol=1e-14, atol=0)


@pytest.mark.parametrize("weighter", [GLS(2), LogLoss(2)])
def test_scale_of_a_loss_cancels(weighter: LossRule) -> None:
    small, large = weighter.weights(feedback({0: 0.5, 1: 0.3})), weighter.weights(feedback({0: 0.5, 1: 3.0}))
    torch.testing.assert_close(small[1] * 0.3 / (small[0] * 0.5), large[1] * 3.0 / (large[0] * 0.5))


def test_uwso_weights_have_mean_1() -> None:
    losses = double(0.1, 1, 4)
    found = UWSO(3, temperature=2.0).weights(feedback(dict(enumerate(losses.tolist()))))
    torch.testing.assert_close(found, 3 * uwso_weights(losses, 2.0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("weighter", [GLS(2), LogLoss(2), UWSO(2)])
def test_memorised_task_does_not_take_all(weighter: LossRule) -> None:
    weights = weighter.weights(feedback({0: 0.0, 1: 1.0}))
    assert 1 < weights[0] / weights[1] < 60
    assert torch.equal(weights, weighter.weights(feedback({0: 0.05, 1: 1.0})))


@pytest.mark.parametrize("weighter", [GLS(3), LogLoss(3), UWSO(3)])
def test_present_tasks_share_what_they_had(weighter: LossRule) -> None:
    weighter.update(feedback({0: 0.2, 1: 1.0, 2: 4.0}))
    before = weighter.weights(None)
    weighter.update(feedback({0: 2.0, 2: 0.5}))
    after = weighter.weights(None)
    assert after[1] == before[1]
    assert after[2] > after[0]
    assert float(after.sum()) == pytest.approx(3, abs=1e-14)


@pytest.mark.parametrize("weighter", [GLS, LogLoss, UWSO])
@pytest.mark.parametrize("min_loss", [0.0, -1.0, float("nan")])
def test_floor_is_above_0(weighter: type[GLS], min_loss: float) -> None:
    with pytest.raises(ValueError, match=rf"^min_loss: must be above 0 nats per token, found {min_loss}; "):
        weighter(2, min_loss=min_loss)


def test_temperature_is_above_0() -> None:
    with pytest.raises(ValueError, match=r"^temperature: must be above 0, found 0.0; "):
        UWSO(2, temperature=0.0)
