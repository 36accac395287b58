from __future__ import annotations

import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.weighters import DWA
from mtl.weighters.dwa import dwa_weights


def update(weighter: DWA, losses: dict[int, float], counts: dict[int, int] | None = None) -> None:
    counts_M = [1 if counts is None else counts[task] for task in losses]
    weighter.update(TaskFeedback(0, list(losses), counts_M, torch.tensor(list(losses.values()), dtype=torch.float64)))


def test_golden_weights() -> None:
    found = dwa_weights(torch.tensor([1.0, 0.5], dtype=torch.float64), temperature=2.0)
    assert found.tolist() == pytest.approx([1.124, 0.876], abs=5e-4)


def test_weights_follow_the_rates_between_the_last_two_windows() -> None:
    weighter = DWA(2, window=3)
    for losses in ([2.0, 3.0], [2.0, 1.0], [2.0, 2.0]):
        update(weighter, dict(enumerate(losses)))
    for _ in range(2):
        update(weighter, {0: 2.0, 1: 1.0})
    assert weighter.weights(None).tolist() == [1, 1]  # the second window is not full
    update(weighter, {0: 2.0, 1: 1.0})
    torch.testing.assert_close(
        weighter.weights(None), dwa_weights(torch.tensor([1.0, 0.5], dtype=torch.float64), 2.0), rtol=1e-14, atol=0
    )
    for _ in range(3):
        update(weighter, {0: 2.0, 1: 1.0})  # no window but the last two counts
    torch.testing.assert_close(weighter.weights(None), torch.ones(2, dtype=torch.float64), rtol=1e-14, atol=0)


def test_window_means_are_over_target_tokens() -> None:
    weighter = DWA(1, window=2)
    for loss, tokens in ((1.0, 30), (5.0, 10)):
        losses = torch.tensor([loss], dtype=torch.float64)
        weighter.update(TaskFeedback(0, [0], [1], losses, num_targets_M=[tokens]))
    assert weighter.state_dict()["last"].tolist() == [2.0]


def test_windows_of_tokens_close_after_as_many_of_the_task() -> None:
    weighter = DWA(2, window=1, window_tokens=100)
    for step in range(10):
        losses = torch.tensor([2.0, 2.0 if step < 5 else 1.0], dtype=torch.float64)
        weighter.update(TaskFeedback(step, [0, 1], [1, 1], losses, num_targets_M=[50, 20]))
        if step < 9:
            assert weighter.weights(None).tolist() == [1, 1]  # the second task has 100 tokens after 5 steps
    expected = dwa_weights(torch.tensor([1.0, 0.5], dtype=torch.float64), 2.0)
    torch.testing.assert_close(weighter.weights(None), expected, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=r"^num_targets_M: must be given for window_tokens, found None; "):
        update(weighter, {0: 1.0})


def test_window_means_are_over_examples_where_the_tokens_are_not_known() -> None:
    weighter = DWA(1, window=2)
    update(weighter, {0: 1.0}, {0: 3})
    update(weighter, {0: 5.0}, {0: 1})
    assert weighter.state_dict()["last"].tolist() == [2.0]


def test_each_task_has_windows_of_its_own_and_weight_1_until_there_are_two() -> None:
    weighter = DWA(3, window=2)
    for step in range(6):
        update(weighter, {0: 2.0, 1: 2.0 * 0.8**step} if step % 2 else {0: 2.0})
    assert weighter.weights(None).tolist() == [1, 1, 1]  # three steps with task 1, one window
    update(weighter, {1: 0.9})
    weights = weighter.weights(None)
    assert weights[2] == 1
    assert weights[0] > 1 > weights[1]


def test_only_a_slower_fall_raises_a_weight() -> None:
    weighter = DWA(3, window=5)
    for step in range(40):
        update(weighter, {0: 2.0 * 0.97**step, 1: 0.5 * 0.97**step, 2: 2.0})
    weights = weighter.weights(None)
    torch.testing.assert_close(weights[0], weights[1])  # the scale of a loss is nothing
    assert weights[2] > 1.01 * weights[0]


def test_memorised_task_counts_as_one_that_stands_still() -> None:
    weighter = DWA(2, window=1)
    for loss in (1e-9, 1e-4):  # ten thousand times worse, and still memorised
        update(weighter, {0: loss, 1: 1.0})
    torch.testing.assert_close(weighter.weights(None), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature: must be above 0, found 0.0; "),
        ({"window": 0}, "window: must be at least 1 step with the task, found 0; "),
        ({"window_tokens": 0}, "window_tokens: must be at least 1, found 0; "),
        ({"min_loss": -1.0}, "min_loss: must be above 0 nats per token, found -1.0; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        DWA(2, **arguments)
