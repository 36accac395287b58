from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters import STCH
from mtl.weighters.stch import stch_weights

NAMES = ["prose", "labels", "情感 😀"]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def feedback(losses: dict[int, float]) -> TaskFeedback:
    return TaskFeedback(0, list(losses), [1] * len(losses), double(*losses.values()))


def warmed_up(losses: dict[int, float], **arguments: Any) -> STCH:
    weighter = STCH(len(losses), warmup=2, **arguments)
    for factor in (0.5, 1.5):
        weighter.update(feedback({task: factor * loss for task, loss in losses.items()}))
    return weighter


def smooth_maximum(objectives: Tensor, mu: float) -> Tensor:
    return mu * torch.logsumexp(objectives / mu, 0)


def proportions(raw: Tensor) -> Tensor:
    return raw * len(raw) / raw.sum()


def test_golden_weights() -> None:
    assert stch_weights(double(1, 2, 3), 0.5).tolist() == pytest.approx([0.015876, 0.117310, 0.866813], abs=5e-7)


def test_the_papers_form_has_the_golden_weights_from_the_first_step_on() -> None:
    weighter = STCH(3, mu=0.5, relative=False)
    for _ in range(3):
        found = weighter.weights(feedback({0: 1.0, 1: 2.0, 2: 3.0}))
        assert (found / 3).tolist() == pytest.approx([0.015876, 0.117310, 0.866813], abs=5e-7)
        weighter.update(feedback({0: 1.0, 1: 2.0, 2: 3.0}))
    shifted = STCH(3, NAMES, mu=0.5, relative=False, z={"prose": 1.0}).weights(feedback({0: 2.0, 1: 2.0, 2: 3.0}))
    torch.testing.assert_close(shifted, found, rtol=1e-12, atol=0)
    absent = weighter.weights(feedback({0: 1.0, 1: 1.0}))
    assert absent[2] == found[2]
    assert absent[0] == absent[1]


@pytest.mark.parametrize("mu", [0.01, 0.1, 0.5, 1.0, 7.0])
def test_weights_are_the_gradient_of_a_smooth_maximum_within_its_bounds(mu: float) -> None:
    objectives = double(0.3, -1.0, 0.25, 2.0).requires_grad_()
    value = smooth_maximum(objectives, mu)
    value.backward()
    torch.testing.assert_close(stch_weights(objectives.detach(), mu), objectives.grad, rtol=1e-10, atol=1e-15)
    assert 2.0 <= value.item() <= 2.0 + mu * math.log(4)


def test_limits_are_the_worst_case_and_the_mean() -> None:
    assert stch_weights(double(1, 2, 3), 1e-3).tolist() == [0, 0, 1]
    assert stch_weights(double(1, 2, 3), 1e9).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("mu", [0.1, 0.5, 2.0])
def test_after_the_warm_up_the_weights_are_the_gradient_of_the_objective(mu: float) -> None:
    nadir = {0: 2.0, 1: 0.6, 2: 1.0}
    weighter = warmed_up(nadir, mu=mu)
    losses = double(1.0, 0.5, 0.2).requires_grad_()
    smooth_maximum(torch.log(losses / double(*nadir.values())), mu).backward()
    found = weighter.weights(feedback(dict(enumerate(losses.tolist()))))
    assert losses.grad is not None
    torch.testing.assert_close(found, proportions(losses.grad), rtol=1e-12, atol=0)


def test_the_ideal_point_is_subtracted_from_losses_and_nadir() -> None:
    weighter = STCH(3, NAMES, z={"prose": 1.5, "labels": 0.1}, warmup=1)
    weighter.update(feedback({0: 3.5, 1: 0.6, 2: 1.0}))
    losses, ideal, nadir = double(2.5, 0.5, 0.2).requires_grad_(), double(1.5, 0.1, 0), double(2.0, 0.5, 1.0)
    smooth_maximum(torch.log((losses - ideal) / nadir), 0.5).backward()
    found = weighter.weights(feedback({0: 2.5, 1: 0.5, 2: 0.2}))
    assert losses.grad is not None
    torch.testing.assert_close(found, proportions(losses.grad), rtol=1e-12, atol=0)


def test_warm_up_is_that_of_log_losses_and_each_tasks_own() -> None:
    weighter = STCH(3, warmup=2)
    torch.testing.assert_close(weighter.weights(feedback({0: 0.5, 1: 1, 2: 2})), proportions(double(2, 1, 0.5)))
    for losses in ({0: 2.0, 1: 1.0}, {0: 4.0, 2: 1.0}):
        weighter.update(feedback(losses))
    equal = STCH(3, warmup=2)
    equal.load_state_dict({**weighter.state_dict(), "weight": torch.ones(3, dtype=torch.float64)})
    found = equal.weights(feedback({0: 1.0, 1: 0.5, 2: 0.25}))  # task 0 has a nadir of 3, and squares 1 / 3 at mu = 0.5
    torch.testing.assert_close(found, proportions(double(1 / 9, 2, 4)), rtol=1e-13, atol=0)


def test_nadir_is_fixed_after_the_warm_up() -> None:
    weighter = warmed_up({0: 2.0, 1: 0.6})
    for _ in range(5):
        weighter.update(feedback({0: 0.1, 1: 0.1}))
    assert (weighter.state_dict()["early_sum"] / 2).tolist() == pytest.approx([2.0, 0.6], abs=1e-15)


def test_at_mu_1_the_weights_are_constant() -> None:
    weighter = warmed_up({0: 2.0, 1: 0.5}, mu=1.0)
    for losses in ({0: 2.0, 1: 0.5}, {0: 0.1, 1: 0.5}, {0: 1.5, 1: 0.2}):
        torch.testing.assert_close(weighter.weights(feedback(losses)), double(0.4, 1.6), rtol=1e-13, atol=0)


def test_the_task_that_lags_gains_whatever_its_entropy() -> None:
    weighter = warmed_up({0: 4.0, 1: 0.4}, mu=0.1)
    start = weighter.weights(feedback({0: 4.0, 1: 0.4}))
    assert weighter.weights(feedback({0: 2.0, 1: 0.39}))[1] > start[1]  # large loss, halved; small loss, where it was
    assert weighter.weights(feedback({0: 3.9, 1: 0.2}))[1] < start[1]


@pytest.mark.parametrize("mu", [0.5, 1.0, 10.0])
def test_a_memorised_task_does_not_take_all(mu: float) -> None:
    at_first = STCH(2, mu=mu).weights(feedback({0: 0.0, 1: 1.0}))
    later = warmed_up({0: 1.0, 1: 1.0}, mu=mu).weights(feedback({0: 0.0, 1: 1.0}))
    for weights in (at_first, later):
        assert weights[0] / weights[1] < 20.5
    assert torch.equal(at_first, STCH(2, mu=mu).weights(feedback({0: 0.05, 1: 1.0})))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mu": 0.0}, r"^mu: must be above 0, found 0.0; "),
        ({"mu": math.nan}, r"^mu: must be above 0, found nan; "),
        ({"warmup": 0}, r"^warmup: must be at least 1 step with the task, found 0; "),
        ({"min_loss": 0.0}, r"^min_loss: must be above 0 nats per token, found 0.0; "),
        ({"z": -0.1}, r"^z: must be finite and not negative, found -0.1; "),
        ({"z": {"x": 0.1}, "names": NAMES}, r"^z: must name tasks of the run, found 'x'; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STCH(3, **arguments)
