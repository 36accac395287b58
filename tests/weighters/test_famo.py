from __future__ import annotations

import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.weighters import FAMO
from mtl.weighters.famo import famo_gradient, famo_weights


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def feedback(before: dict[int, float], after: dict[int, float] | None = None) -> TaskFeedback:
    after_M = None if after is None else double(*after.values())
    return TaskFeedback(0, list(before), [1] * len(before), double(*before.values()), losses_after_M=after_M)


def test_weights_of_log_losses_sum_to_1_and_scale_with_the_inverse_loss() -> None:
    logit_M, losses_M = double(0.3, -1.0, 0.0), double(0.2, 1.0, 5.0)
    found_M = famo_weights(logit_M, losses_M)
    expected_M = logit_M.exp() / losses_M
    torch.testing.assert_close(found_M, expected_M / expected_M.sum(), rtol=1e-14, atol=0)
    # The direction sum c z g / L does not change when a loss, and so its gradient, is scaled.
    scaled_M = famo_weights(logit_M, losses_M * double(1, 10, 1)) * double(1, 10, 1)
    torch.testing.assert_close(scaled_M / scaled_M.sum(), found_M, rtol=1e-14, atol=0)


def test_gradient_agrees_with_autograd_through_the_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        logit_M, before_M, after_M = torch.rand(3, 4, dtype=torch.float64, generator=generator) + 0.1
        logit_M.requires_grad_()
        decrease_M = before_M.log() - after_M.log()
        (torch.softmax(logit_M, dim=0) @ decrease_M + 0.01 * (logit_M**2).sum() / 2).backward()
        found_M = famo_gradient(logit_M.detach(), before_M, after_M, gamma=0.01)
        torch.testing.assert_close(found_M, logit_M.grad, rtol=1e-12, atol=1e-16)


def test_agrees_with_torch_adam_on_the_softmax() -> None:
    weighter = FAMO(3, learning_rate=0.05, gamma=0.02)
    logit_T = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logit_T], lr=0.05, weight_decay=0.02)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        before_T, after_T = torch.rand(2, 3, dtype=torch.float64, generator=generator) + 0.1
        weighter.update(feedback(dict(enumerate(before_T.tolist())), dict(enumerate(after_T.tolist()))))
        optimizer.zero_grad()
        (torch.softmax(logit_T, dim=0) @ (before_T.log() - after_T.log())).backward()
        optimizer.step()
    torch.testing.assert_close(weighter.state_dict()["logit"], logit_T.detach(), rtol=1e-12, atol=1e-14)


def test_weights_are_for_the_current_losses() -> None:
    weighter = FAMO(3)
    torch.testing.assert_close(weighter.weights(feedback({0: 0.5, 1: 1.0, 2: 2.0})), double(2, 1, 0.5) * 3 / 3.5)


def test_logit_of_the_fastest_task_goes_down() -> None:
    weighter = FAMO(3, learning_rate=0.1)
    weighter.update(feedback({0: 1.0, 1: 2.0, 2: 4.0}, {0: 0.9, 1: 1.99, 2: 3.98}))
    logit_T = weighter.state_dict()["logit"]
    torch.testing.assert_close(logit_T, double(-0.1, 0.1, 0.1), rtol=1e-4, atol=0)


def test_weight_rises_for_a_slow_task_and_only_for_one() -> None:
    same, slow = FAMO(2), FAMO(2)
    for step in range(60):
        before = 2.0 * 0.98**step
        same.update(feedback({0: before, 1: before / 4}, {0: before * 0.98, 1: before / 4 * 0.98}))
        slow.update(feedback({0: before, 1: 1.0}, {0: before * 0.98, 1: 0.999}))
    torch.testing.assert_close(same.state_dict()["logit"], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-3)
    logit_T = slow.state_dict()["logit"]
    assert logit_T[1] - logit_T[0] > 1
    # Its share of the log losses, weight times loss, rises with it.
    weights = slow.weights(feedback({0: 0.7, 1: 1.0}))
    assert weights[1] * 1.0 > 2.5 * weights[0] * 0.7


def test_absent_tasks_are_no_part_of_the_softmax() -> None:
    weighter, pair = FAMO(3), FAMO(2)
    for _ in range(5):
        weighter.update(feedback({0: 1.0, 2: 2.0}, {0: 0.8, 2: 1.9}))
        pair.update(feedback({0: 1.0, 1: 2.0}, {0: 0.8, 1: 1.9}))
    assert torch.equal(weighter.state_dict()["logit"][[0, 2]], pair.state_dict()["logit"])
    assert weighter.weights(None)[1] == 1


def test_a_task_alone_says_nothing() -> None:
    weighter = FAMO(2)
    weighter.update(feedback({0: 1.0, 1: 2.0}, {0: 0.8, 1: 1.9}))
    before = weighter.state_dict()
    weighter.update(feedback({1: 3.0}, {1: 0.1}))
    assert all(torch.equal(values, before[key]) for key, values in weighter.state_dict().items())


def test_memorised_tasks_neither_take_all_nor_gain_from_standing_still() -> None:
    weighter = FAMO(3)
    for step in range(200):
        loss = 2.0 * 0.995**step
        now = {0: 0.0, 1: loss, 2: loss}
        weighter.update(feedback(now, {0: 1e-9, 1: loss * 0.995, 2: loss * 0.995}))
    assert weighter.state_dict()["logit"][0] == 0
    weights = weighter.weights(feedback({0: 0.0, 1: 1.0, 2: 1.0}))
    torch.testing.assert_close(weights[0] / weights[1], torch.tensor(20.0, dtype=torch.float64), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: must be above 0, found 0.0; "),
        ({"gamma": -1.0}, "gamma: must be at least 0, found -1.0; "),
        ({"min_loss": 0.0}, "min_loss: must be above 0 nats per token, found 0.0; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        FAMO(2, **arguments)
