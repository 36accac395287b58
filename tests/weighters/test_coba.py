from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters import CoBa
from mtl.weighters.coba import absolute_scores, divergence_factor, relative_scores, slope


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def evaluation(step: int, losses: dict[int, float]) -> TaskFeedback:
    results = {task: {"loss": loss} for task, loss in losses.items()}
    return TaskFeedback(step, (), (), torch.empty(0, dtype=torch.float64), validation=results)


def after(weighter: CoBa, *losses_T: list[float], interval: int = 10) -> Tensor:
    """Evaluations of all tasks at equal distances."""
    for index, losses in enumerate(losses_T):
        weighter.update(evaluation(interval * index, dict(enumerate(losses))))
    return weighter.weights(None)


def softmax(values: np.ndarray) -> np.ndarray:
    exps: np.ndarray = np.exp(values - values.max())
    return exps / exps.sum()  # type: ignore[no-any-return]


def coba_of_the_paper(losses_ET: np.ndarray, window: int, tau: float) -> np.ndarray:
    """The weights after each evaluation from the second one on, by numpy, with sum 1."""
    ratios_ET = losses_ET / losses_ET[0]
    slopes, weights = [], []
    for end in range(2, len(ratios_ET) + 1):
        start = max(0, end - window)
        slopes.append(np.polyfit(np.arange(start, end), ratios_ET[start:end], 1)[0])
        history = np.array(slopes)
        rcs = softmax(len(history[-1]) * history[-1] / np.abs(history[-1]).sum())
        last = history[-window:]
        acs = softmax(-len(last) * last[-1] / np.abs(last).sum(0))
        largest = history.max(1)
        factor = min(1.0, len(largest) * softmax(-tau * len(largest) * largest / np.abs(largest).sum())[-1])
        weights.append(factor * rcs + (1 - factor) * acs)
    return np.array(weights)


def test_slope_is_that_of_least_squares() -> None:
    x, y = np.array([0, 3, 4, 9, 20]), np.array([1.0, 0.8, 0.9, 0.5, 0.45])
    assert slope(list(zip(x.tolist(), y.tolist(), strict=True))) == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-12)
    assert slope([(4, 1.0), (4, 2.0)]) == 0


def test_relative_scores_favour_the_slow() -> None:
    assert relative_scores(double(-1.0, -1.0, -1.0)).tolist() == pytest.approx([1 / 3] * 3)
    scores = relative_scores(double(-4.0, -1.0, 1.0))
    assert scores.tolist() == pytest.approx(softmax(np.array([-2.0, -0.5, 0.5])))
    assert (scores.diff() > 0).all()
    assert relative_scores(double(0.0, 0.0)).tolist() == [0.5, 0.5]


def test_absolute_scores_punish_turning_away() -> None:
    scores = absolute_scores([[-1.0, -1.0, -1.0], [-3.0, -2.0, 1.0], [-1.0, -0.5, 0.0]])
    assert scores.tolist() == pytest.approx(softmax(np.array([1.0, -0.5, 0.0])))


def test_divergence_factor_is_1_while_all_converge_and_falls_once_one_diverges() -> None:
    assert divergence_factor([-0.3], 5.0) == 1
    assert divergence_factor([-0.3] * 6, 5.0) == pytest.approx(1)
    assert divergence_factor([-0.1, -0.2, -0.3], 5.0) == 1  # 2.98 without the bound
    assert divergence_factor([-0.3, -0.2, 0.1], 5.0) < 0.01
    assert divergence_factor([-0.3, -0.2, 0.1], 0.0) == pytest.approx(1)


@pytest.mark.parametrize(("window", "tau"), [(5, 5.0), (3, 1.0), (50, 5.0)])
def test_agrees_with_the_paper_over_a_noisy_run(window: int, tau: float) -> None:
    generator = np.random.default_rng(2)
    falls = np.exp(-np.outer(np.arange(12), [0.2, 0.05, 0.01])) + np.array([0.2, 1.0, 3.0])
    losses_ET = falls * (1 + 0.03 * generator.standard_normal(falls.shape))
    losses_ET[7:, 0] += 0.2 * np.arange(5)  # the first task overfits
    expected_ET = coba_of_the_paper(losses_ET, window, tau)
    weighter = CoBa(3, window=window, tau=tau, min_weight=0.0)
    found = [after(weighter, losses_ET[0].tolist())]
    for index in range(1, 12):
        weighter.update(evaluation(7 * index, dict(enumerate(losses_ET[index].tolist()))))
        found.append(weighter.weights(None))
    assert found[0].tolist() == [1, 1, 1]
    torch.testing.assert_close(torch.stack(found[1:]), 3 * torch.from_numpy(expected_ET), rtol=1e-9, atol=1e-12)


def test_the_slow_task_gains_while_all_converge() -> None:
    weights = after(CoBa(2), [1.0, 4.0], [0.8, 3.8], [0.6, 3.6], [0.4, 3.4])
    assert weights[1] > 1 > weights[0]


def test_the_task_that_diverges_loses_weight() -> None:
    weighter = CoBa(2)
    converging = after(weighter, [1.0, 1.0], [0.8, 0.9], [0.6, 0.8])
    assert converging[1] > 1
    for step, loss in ((30, 1.0), (40, 1.3), (50, 1.7)):
        weighter.update(evaluation(step, {0: 0.6 - step / 500, 1: loss}))
    assert weighter.weights(None)[1] < 1


def test_losses_count_relative_to_those_before_training() -> None:
    one = after(CoBa(2), [1.0, 4.0], [0.8, 3.9], [0.7, 3.4])
    other = after(CoBa(2), [1.0, 0.4], [0.8, 0.39], [0.7, 0.34])
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("interval", [1, 3, 1000])
def test_any_interval_gives_the_same_weights(interval: int) -> None:
    losses = [[1.0, 2.0], [0.7, 1.9], [0.6, 1.7], [0.5, 1.75]]
    torch.testing.assert_close(after(CoBa(2), *losses, interval=interval), after(CoBa(2), *losses), rtol=1e-10, atol=0)


def test_a_task_that_was_not_evaluated_for_a_while_does_not_seem_steeper() -> None:
    """Both losses fall by 1 % a step; one is measured at every fifth evaluation only."""
    weighter = CoBa(2, min_weight=0.0)
    for step in range(51):
        tasks = (0, 1) if step % 5 == 0 else (0,)
        weighter.update(evaluation(step, dict.fromkeys(tasks, 1 - step / 100)))
    slopes = weighter.state_dict()["slopes"]
    assert slopes[0][-1] == pytest.approx(-0.01)
    assert slopes[1][-1] == pytest.approx(-0.01)
    assert weighter.weights(None).tolist() == pytest.approx([1, 1])


def test_tasks_not_evaluated_keep_their_weights() -> None:
    weighter = CoBa(3)
    before = after(weighter, [1.0, 1.0, 1.0], [0.9, 0.5, 0.7])
    weighter.update(evaluation(30, {0: 0.9, 1: 0.4}))
    found = weighter.weights(None)
    assert found[2] == before[2]
    assert found[0] != before[0]
    assert float(found.mean()) == pytest.approx(1, abs=1e-15)


def test_the_same_model_evaluated_twice_counts_once() -> None:
    once, twice = CoBa(2), CoBa(2)
    for step, losses in ((0, {0: 1.0, 1: 2.0}), (5, {0: 0.8, 1: 1.9})):
        for weighter in (once, twice, twice):
            weighter.update(evaluation(step, losses))
    assert torch.equal(once.weights(None), twice.weights(None))
    assert once.state_dict()["points"] == twice.state_dict()["points"]


def test_warm_up_keeps_weights_equal() -> None:
    weighter = CoBa(2, warmup=4)
    assert after(weighter, [1.0, 1.0], [0.5, 0.9], [0.4, 0.9]).tolist() == [1, 1]
    weighter.update(evaluation(30, {0: 0.3, 1: 0.9}))
    assert weighter.weights(None)[1] > 1


@pytest.mark.parametrize("min_weight", [0.0, 0.1, 0.6])
def test_no_weight_falls_below_the_least(min_weight: float) -> None:
    losses = [[1.0] * 8, [0.2, *[1.0] * 7], [0.01, *[1.0] * 7]]
    weights = after(CoBa(8, min_weight=min_weight), *losses)
    assert min_weight <= weights.min() < min_weight + 0.01


def test_odd_losses_are_survived() -> None:
    weighter = CoBa(3)
    for step, losses in enumerate([[0.0, 1.0, 2.0], [0.0, math.nan, 2.0], [0.0, 1.0, 2.0], [1e-9, 0.0, math.inf]]):
        weighter.update(evaluation(step, dict(enumerate(losses))))
        assert weighter.weights(None).isfinite().all()
        json.dumps({key: value for key, value in weighter.state_dict().items() if key != "weight"}, allow_nan=False)


def test_training_steps_change_nothing() -> None:
    weighter = CoBa(2)
    weights = after(weighter, [1.0, 1.0], [0.9, 0.5])
    weighter.update(TaskFeedback(40, [0, 1], [1, 1], double(9.0, 0.1)))
    assert torch.equal(weighter.weights(None), weights)
    assert weighter.needs == {"validation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, r"^window: must be at least 2 evaluations, found 1; "),
        ({"tau": -1.0}, r"^tau: must be at least 0, found -1.0; "),
        ({"tau": math.nan}, r"^tau: must be at least 0, found nan; "),
        ({"warmup": 1}, r"^warmup: must be at least 2 evaluations, found 1; "),
        ({"min_weight": 1.5}, r"^min_weight: must be in \[0, 1\], found 1.5; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoBa(2, **arguments)
