"""Exp3 and Exp3.S, their rewards, and the quantiles that rescale them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.samplers import Exp3, Exp3S
from mtl.samplers.exp3s import shared_out
from mtl.samplers.rewards import GapClosed, LossDecrease
from mtl.samplers.running_scale import RunningScale


def trained(counts: dict[int, int], falls: dict[int, float], step: int = 0, loss: float = 2.0) -> TaskFeedback:
    """A step that took the present tasks' losses down by these shares of them."""
    tasks = list(counts)
    before = torch.full((len(tasks),), loss, dtype=torch.float64)
    after = torch.tensor([loss * (1 - falls[task]) for task in tasks], dtype=torch.float64)
    return TaskFeedback(step, tasks, list(counts.values()), before, losses_after_M=after)


def evaluated(losses: dict[int, float], step: int = 0) -> TaskFeedback:
    results = {task: {"loss": loss} for task, loss in losses.items()}
    return TaskFeedback(step, [], [], torch.empty(0), validation=results)


def test_exp3_golden() -> None:
    """gamma / T = 0.1 times (1/4) / (1/3) times the reward 1 for the first task; the lowest reward so far counts 0."""
    sampler = Exp3([1, 1, 1], gamma=0.3)
    assert sampler.probabilities == pytest.approx([1 / 3] * 3, rel=1e-14)
    sampler.update(trained({0: 1, 2: 3}, {0: 0.5, 2: -0.2}))
    assert sampler.state_dict()["log_weights"] == pytest.approx([0.075, 0, 0], rel=1e-12)
    weights = np.array([math.exp(0.075), 1, 1])
    np.testing.assert_allclose(sampler.probabilities, 0.7 * weights / weights.sum() + 0.1, rtol=1e-12)
    assert sampler.signals == {"reward": [1.0, None, 0.0]}


def test_exp3_is_the_algorithm_of_the_paper_where_a_step_is_one_draw() -> None:
    """Auer et al. (2002), Fig. 1, by products of weights as printed there, with rewards scaled by their quantiles."""
    generator, gamma, num_tasks = np.random.default_rng(0), 0.2, 4
    sampler, weights, history = Exp3([1] * num_tasks, gamma=gamma), np.ones(num_tasks), []
    for step in range(300):
        p = (1 - gamma) * weights / weights.sum() + gamma / num_tasks
        np.testing.assert_allclose(sampler.probabilities, p, rtol=1e-9)
        arm, raw = sampler.counts(1).index(1), float(generator.random())
        history.append(raw)
        low, high = np.quantile(history, [0.2, 0.8])
        reward = 0.5 if low == high else float(np.clip((raw - low) / (high - low), 0, 1))
        weights[arm] *= math.exp(gamma * (reward / p[arm]) / num_tasks)
        sampler.update(trained({arm: 1}, {arm: raw}, step))


@pytest.mark.parametrize(("num_steps", "gamma"), [(1000, 0.098395), (200, 0.220017), (3, 1.0)])
def test_exp3_takes_its_step_size_from_the_number_of_steps(num_steps: int, gamma: float) -> None:
    sampler = Exp3([1] * 8, num_steps=num_steps)
    sampler.update(trained({0: 4}, {0: 1.0}))
    # (gamma / T) / (1 / T) times a reward of a half, since there is no other to compare it with
    assert 2 * sampler.state_dict()["log_weights"][0] == pytest.approx(gamma, abs=6e-7)


def test_exp3_floor_apart_from_gamma() -> None:
    sampler = Exp3([1, 1], gamma=0.5, floor=0.1)
    for step in range(300):
        sampler.update(trained({0: 1, 1: 1}, {0: 1.0, 1: 0.0}, step))
    np.testing.assert_allclose(sampler.probabilities, [0.95, 0.05], rtol=1e-6)


def test_exp3s_golden() -> None:
    """w = 0, 3 arms, arm 1 drawn with reward 1 (it tops all before), at t = 10 with eta = 0.1."""
    sampler = Exp3S([1, 1, 1], eta=0.1)
    state = sampler.state_dict()
    state["index"] = 9
    state["scale"] |= {"kept": [0.1] * 9, "num_values": 9}
    sampler.load_state_dict(state)
    sampler.update(trained({1: 1}, {1: 0.5}))
    np.testing.assert_allclose(sampler.state_dict()["log_weights"], [0.017342, 0.27374, 0.017342], atol=6e-7)
    assert sampler.signals == {"reward": [None, 1.0, None]}


def test_exp3s_is_the_algorithm_of_the_paper_where_a_step_is_one_draw() -> None:
    """Graves et al. (2017), Eq. for w_{t,i}, in plain exponentials; quantiles of the whole history."""
    generator, num_tasks, eta, beta, epsilon = np.random.default_rng(1), 3, 0.05, 0.01, 0.1
    sampler = Exp3S([1] * num_tasks, eta=eta, beta=beta, floor=epsilon)
    w, history = np.zeros(num_tasks), []
    for t in range(2, 300):
        p = (1 - epsilon) * np.exp(w) / np.exp(w).sum() + epsilon / num_tasks
        np.testing.assert_allclose(sampler.probabilities, p, rtol=1e-9)
        arm, raw = sampler.counts(1).index(1), float(generator.normal()) / 10
        history.append(raw)
        low, high = np.quantile(history, [0.2, 0.8])
        reward = 0.0 if low == high else float(np.clip(2 * (raw - low) / (high - low) - 1, -1, 1))
        estimates = [(reward * (i == arm) + beta) / p[i] for i in range(num_tasks)]
        grown = [math.exp(w[i] + eta * estimates[i]) for i in range(num_tasks)]
        w = np.array(
            [
                math.log((1 - 1 / t) * grown[i] + (1 / t) / (num_tasks - 1) * (sum(grown) - grown[i]))
                for i in range(num_tasks)
            ]
        )
        sampler.update(trained({arm: 1}, {arm: raw}, t))


def test_sharing_out() -> None:
    w = np.array([0.3, -1.0, 2.0])
    np.testing.assert_allclose(shared_out(w, 0.0), w, rtol=1e-15)  # without sharing it is Exp3
    np.testing.assert_allclose(shared_out(w[:2], 0.5), [math.log((math.exp(0.3) + math.exp(-1)) / 2)] * 2)
    assert np.exp(shared_out(w, 0.2)).sum() == pytest.approx(np.exp(w).sum())
    assert np.isfinite(shared_out(np.array([1e4, 0.0, -1e4]), 1e-6)).all()
    assert shared_out(np.array([0.7]), 0.5).tolist() == [0.7]


def test_exp3s_floor_and_ceiling() -> None:
    sampler = Exp3S([1, 1, 1], eta=1.0, floor=0.06)
    for step in range(200):
        sampler.update(trained({0: 1, 1: 1, 2: 1}, {0: 0.5, 1: 0.1, 2: 0.0}, step))
    assert min(sampler.probabilities) >= 0.02
    assert sampler.probabilities[0] > 0.8


def test_equal_rewards_are_no_news() -> None:
    sampler = Exp3S([1, 1], eta=1.0)
    for step in range(50):
        sampler.update(trained({0: 8, 1: 8}, {0: 0.3, 1: 0.3}, step))
    assert sampler.probabilities == pytest.approx([0.5, 0.5], abs=1e-12)
    assert sampler.signals == {"reward": [0.0, 0.0]}


def test_a_single_task_has_rewards_and_keeps_everything() -> None:
    for sampler in (Exp3([5], num_steps=10), Exp3S([5])):
        sampler.update(trained({0: 4}, {0: 0.5}))
        assert sampler.probabilities == (1.0,)
        assert sampler.counts(3) == [3]


def test_importance_weights_average_to_1() -> None:
    """So the estimate of a constant reward of an example is that reward, however rarely its task is drawn."""
    source, sampler = LossDecrease(3), Exp3([1, 1, 1], gamma=1.0)
    state = sampler.state_dict()
    state["probabilities"] = [0.9, 0.08, 0.02]
    sampler.load_state_dict(state)
    total, num_steps = np.zeros(3), 2_000
    for step in range(num_steps):
        counts = {task: n for task, n in enumerate(sampler.counts(4)) if n}
        falls = {task: 0.03 * n for task, n in counts.items()}
        reward = source.collect(trained(counts, falls, step), sampler.probabilities)
        assert reward is not None
        np.testing.assert_allclose(reward.gains_M, 0.03 * 4 / 3)  # what an equal share would have brought
        total[list(reward.tasks)] += reward.gains_M * reward.importance_M
    np.testing.assert_allclose(total / num_steps, 0.04, rtol=0.01)


def test_gap_closed_golden() -> None:
    source, p = GapClosed(3), [0.5, 0.3, 0.2]
    assert source.collect(evaluated({0: 4.0, 1: 2.0, 2: 1.0}), p) is None
    assert source.collect(evaluated({0: 4.0, 1: 2.0, 2: 1.0}), p) is None  # told twice, when a stage begins
    assert source.collect(trained({0: 6, 1: 4}, {0: 0, 1: 0}), p) is None
    assert source.collect(trained({0: 5, 1: 5}, {0: 0, 1: 0}), [0.6, 0.3, 0.1]) is None
    reward = source.collect(evaluated({0: 3.0, 1: 2.5, 2: 0.5}), p)
    assert reward is not None
    assert list(reward.tasks) == [0, 1]  # the third was not drawn
    np.testing.assert_allclose(reward.gains_M, [0.25 * 20 / (3 * 11), -0.25 * 20 / (3 * 9)])
    np.testing.assert_allclose(reward.importance_M, [11 / 11, 9 / 6])
    assert source.collect(evaluated({0: 1.0, 1: 1.0, 2: 0.1}), p) is None  # nothing was drawn since


def test_gap_closed_of_a_task_that_an_evaluation_left_out() -> None:
    source, p = GapClosed(2), [0.5, 0.5]
    source.collect(evaluated({0: 4.0, 1: 2.0}), p)
    source.collect(trained({0: 1, 1: 3}, {0: 0, 1: 0}), p)
    source.collect(evaluated({0: 4.0}), p)
    source.collect(trained({0: 1, 1: 1}, {0: 0, 1: 0}), p)
    reward = source.collect(evaluated({0: 2.0, 1: 1.0}), p)
    assert reward is not None
    np.testing.assert_allclose(reward.gains_M, [0.5 * 2 / (2 * 1), 0.5 * 6 / (2 * 4)])
    np.testing.assert_allclose(reward.importance_M, [1 / 1, 4 / 3])


def test_what_the_rewards_need() -> None:
    assert Exp3([1], num_steps=1).needs == Exp3S([1]).needs == {"losses_after"}
    assert Exp3([1], gamma=0.1, reward="gap_closed").needs == Exp3S([1], reward="gap_closed").needs == {"validation"}
    with pytest.raises(ValueError, match=r"^losses_after_M: must be given for rewards by loss_decrease, found None; "):
        Exp3S([1]).update(TaskFeedback(0, [0], [1], torch.ones(1)))
    Exp3S([1], reward="gap_closed").update(TaskFeedback(0, [0], [1], torch.ones(1)))


def test_tiny_losses_are_no_reward() -> None:
    """A loss of 1e-9 that halves has closed nothing."""
    reward = LossDecrease(1).collect(trained({0: 1}, {0: 0.5}, loss=1e-9), [1.0])
    assert reward is not None
    assert reward.gains_M[0] < 1e-5


def test_the_scale_keeps_a_uniform_sample_of_bounded_size() -> None:
    kept = np.zeros(60)
    for seed in range(1_000):
        scale = RunningScale(6, seed)
        scale(np.arange(60.0))
        values = scale.state_dict()["kept"]
        assert len(values) == 6
        kept[np.array(values, dtype=int)] += 1
    assert np.abs(kept - 100).max() < 4.5 * 10


def test_the_scale_goes_from_the_low_to_the_high_quantile() -> None:
    scale = RunningScale(1000, 0)
    assert scale(np.array([7.0])).tolist() == [0.5]
    scale(np.arange(101.0))
    np.testing.assert_allclose(scale(np.array([-5.0, 19.0, 50.0, 65.0, 200.0])), [0, 0, 0.5, 0.75, 1], atol=0.02)


def test_the_scale_goes_on_after_a_resume() -> None:
    scale, resumed = RunningScale(50, 0), RunningScale(50, 9)
    scale(np.random.default_rng(0).random(500))
    resumed.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    for one in (scale, resumed):
        one(np.random.default_rng(1).random(300))
    assert scale.state_dict() == resumed.state_dict()


@pytest.mark.parametrize(
    ("sampler", "arguments", "message"),
    [
        (Exp3, {}, r"^gamma: must be given where num_steps is not, found num_steps=None; "),
        (Exp3, {"gamma": 0.0}, r"^gamma: must be above 0 and at most 1, found 0.0; "),
        (Exp3, {"gamma": 0.1, "reward": "loss"}, r"^reward: must be loss_decrease or gap_closed, found 'loss'; "),
        (Exp3, {"gamma": 0.1, "floor": 2}, r"^floor: must be a share in \[0, 1\], found 2; "),
        (Exp3S, {"reward": None}, r"^reward: must be loss_decrease or gap_closed, found None; "),
        (Exp3S, {"eta": 0}, r"^eta: must be above 0 and finite, found 0; "),
        (Exp3S, {"beta": -1}, r"^beta: must be at least 0 and finite, found -1; "),
        (Exp3S, {"floor": 0.0}, r"^floor: must be above 0 and at most 1, found 0.0; "),
        (Exp3S, {"reservoir_size": 0}, r"^reservoir_size: must be at least 1, found 0; "),
    ],
)
def test_bad_arguments_are_refused(sampler: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler([1, 2], **arguments)
