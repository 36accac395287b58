from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters import IGB
from mtl.weighters.igb import igb_weights


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def feedback(losses: dict[int, float]) -> TaskFeedback:
    return TaskFeedback(0, list(losses), [1] * len(losses), double(*losses.values()))


def test_golden_weights_of_the_log_losses() -> None:
    assert igb_weights(double(1, 2) / 2).tolist() == pytest.approx([0.755081, 1.244919], abs=5e-7)


def test_weights_of_the_losses_are_the_gradient_of_the_weighted_log_losses() -> None:
    weighter = IGB(3, warmup=2)
    for losses in ({0: 3.0, 1: 0.5, 2: 1.0}, {0: 1.0, 1: 0.7, 2: 1.0}):
        weighter.update(feedback(losses))
    losses_T = double(1.0, 0.5, 0.2).requires_grad_()
    (igb_weights(double(1.0, 0.5, 0.2) / double(2.0, 0.6, 1.0)) * losses_T.log()).sum().backward()
    assert losses_T.grad is not None
    expected = 3 * losses_T.grad / losses_T.grad.sum()
    torch.testing.assert_close(weighter.weights(feedback({0: 1.0, 1: 0.5, 2: 0.2})), expected, rtol=1e-13, atol=0)


def test_starts_with_log_losses() -> None:
    weights = IGB(3).weights(feedback({0: 0.5, 1: 1.0, 2: 2.0}))
    torch.testing.assert_close(weights, double(2, 1, 0.5) * 3 / 3.5, rtol=1e-14, atol=0)


def test_base_is_the_mean_of_the_first_steps_with_the_task() -> None:
    weighter = IGB(2, warmup=3)
    for loss in (1.0, 2.0, 6.0, 9.0, 0.3):
        weighter.update(feedback({1: loss}))
    state = weighter.state_dict()
    assert (state["early_sum"].tolist(), state["num_early"].tolist()) == ([0.0, 9.0], [0, 3])


def test_the_task_that_improved_less_has_the_larger_log_loss_weight() -> None:
    weighter = IGB(2, warmup=1)
    weighter.update(feedback({0: 4.0, 1: 0.4}))
    behind = weighter.weights(feedback({0: 1.0, 1: 0.4})) * double(1.0, 0.4)
    ahead = weighter.weights(feedback({0: 4.0, 1: 0.1})) * double(4.0, 0.1)
    assert behind[1] > behind[0]
    assert ahead[1] < ahead[0]


def test_a_memorised_task_does_not_take_all() -> None:
    weighter = IGB(2, warmup=1)
    weighter.update(feedback({0: 1.0, 1: 1.0}))
    weights = weighter.weights(feedback({0: 0.0, 1: 1.0}))
    assert weights[0] / weights[1] < 20
    assert torch.equal(weights, weighter.weights(feedback({0: 0.05, 1: 1.0})))


def test_losses_may_be_float32_and_carry_a_graph() -> None:
    weighter = IGB(2, warmup=1)
    losses = torch.tensor([1.5, 0.25], requires_grad=True)
    for _ in range(2):
        weighter.update(TaskFeedback(0, [0, 1], [1, 1], losses * 2))
    assert weighter.weights(None).dtype == torch.float64
    assert not weighter.weights(None).requires_grad


@pytest.mark.parametrize("min_loss", [0.0, float("nan")])
def test_bad_arguments_are_refused(min_loss: float) -> None:
    with pytest.raises(ValueError, match=rf"^min_loss: must be above 0 nats per token, found {min_loss}; "):
        IGB(2, min_loss=min_loss)
    with pytest.raises(ValueError, match=r"^warmup: must be at least 1 step with the task, found 0; "):
        IGB(2, warmup=0)
