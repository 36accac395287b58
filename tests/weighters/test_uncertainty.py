from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters import Uncertainty


def feedback(losses: dict[int, float], dtype: torch.dtype = torch.float64) -> TaskFeedback:
    return TaskFeedback(0, list(losses), [1] * len(losses), torch.tensor(list(losses.values()), dtype=dtype))


def random_steps(num_tasks: int, num_steps: int) -> list[dict[int, float]]:
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(num_steps):
        present = torch.rand(num_tasks, generator=generator) < 0.6
        losses = 3 * torch.rand(num_tasks, generator=generator, dtype=torch.float64)
        steps.append({task: float(losses[task]) for task in range(num_tasks) if present[task]})
    return steps


def test_weights_start_equal() -> None:
    weights = Uncertainty(4).weights(None)
    assert weights.dtype == torch.float64
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.ones(4, dtype=torch.float64), rtol=1e-15, atol=0)


def test_agrees_with_autograd_and_torch_adam_of_each_present_task() -> None:
    num_tasks = 4
    weighter = Uncertainty(num_tasks, learning_rate=0.03)
    log_variances = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(num_tasks)]
    optimizers = [torch.optim.Adam([s], lr=0.03) for s in log_variances]
    for losses in random_steps(num_tasks, 60):
        weighter.update(feedback(losses))
        for task, loss in losses.items():
            optimizers[task].zero_grad()
            (torch.exp(-log_variances[task]) * loss + log_variances[task] / 2).backward()
            optimizers[task].step()
    s = torch.stack([each.detach() for each in log_variances])
    torch.testing.assert_close(weighter.state_dict()["log_variance"], s, rtol=1e-12, atol=1e-14)
    expected = num_tasks * torch.exp(-s) / torch.exp(-s).sum()
    torch.testing.assert_close(weighter.weights(None), expected, rtol=1e-12, atol=0)


def test_first_step_moves_by_the_learning_rate_towards_the_optimum() -> None:
    weighter = Uncertainty(3, learning_rate=0.1)
    weighter.update(feedback({0: 2.0, 1: 0.5, 2: 0.1}))  # 0.5 is the loss whose optimum is s = 0
    expected = torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)
    torch.testing.assert_close(weighter.state_dict()["log_variance"], expected, rtol=1e-6, atol=1e-15)


def test_fixed_point_is_log_2l_with_weights_inverse_to_the_losses() -> None:
    losses = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)
    weighter = Uncertainty(3)
    for _ in range(3_000):
        weighter.update(feedback(dict(enumerate(losses.tolist()))))
    torch.testing.assert_close(weighter.state_dict()["log_variance"], torch.log(2 * losses), rtol=0, atol=1e-6)
    torch.testing.assert_close(weighter.weights(None), 3 / losses / (1 / losses).sum(), rtol=1e-5, atol=0)
    assert torch.exp(-weighter.state_dict()["log_variance"]).tolist() == pytest.approx([5, 0.5, 0.125], abs=1e-5)


def test_weights_have_mean_1_and_fall_with_the_loss() -> None:
    weighter = Uncertainty(4)
    for losses in random_steps(4, 150):
        weighter.update(feedback({task: loss / 10 + 2**task / 4 for task, loss in losses.items()}))
        assert float(weighter.weights(None).mean()) == pytest.approx(1, abs=1e-14)
    assert (weighter.weights(None).diff() < 0).all()


def test_vanishing_and_huge_losses_are_clamped() -> None:
    weighter = Uncertainty(2, learning_rate=0.5)
    for _ in range(100):
        weighter.update(feedback({0: 0.0, 1: 1e4}))
    assert weighter.state_dict()["log_variance"].tolist() == [-2.5, 2.5]
    weights = weighter.weights(None)
    assert float(weights[0] / weights[1]) == pytest.approx(math.exp(5))


def test_absent_tasks_are_untouched_bitwise() -> None:
    weighter = Uncertainty(3)
    weighter.update(feedback({0: 1.0, 1: 2.0, 2: 3.0}))
    before = weighter.state_dict()
    for _ in range(5):
        weighter.update(feedback({1: 0.3}))
    after = weighter.state_dict()
    assert before.keys() == {"log_variance", "exp_avg", "exp_avg_sq", "num_steps"}
    for key, values in after.items():
        assert torch.equal(values[[0, 2]], before[key][[0, 2]]), key
        assert values[1] != before[key][1], key


def test_step_without_tasks_changes_nothing() -> None:
    weighter = Uncertainty(2)
    weighter.update(TaskFeedback(0, [], [], torch.zeros(0), validation={0: {"loss": 1.0}}))
    assert all(not values.any() for values in weighter.state_dict().values())


def test_losses_may_be_float32_and_carry_a_graph() -> None:
    weighter = Uncertainty(2)
    losses = torch.tensor([1.5, 0.25], requires_grad=True)
    weighter.update(TaskFeedback(0, [0, 1], [1, 1], losses * 2))
    assert weighter.weights(None).dtype == torch.float64
    assert not weighter.weights(None).requires_grad
    assert losses.grad is None


def test_state_round_trips_bitwise() -> None:
    weighter, resumed = Uncertainty(4), Uncertainty(4)
    steps = random_steps(4, 40)
    for losses in steps[:20]:
        weighter.update(feedback(losses))
    snapshot = weighter.state_dict()
    copies: dict[str, Tensor] = {key: values.clone() for key, values in snapshot.items()}
    resumed.load_state_dict(snapshot)
    for losses in steps[20:]:
        weighter.update(feedback(losses))
        resumed.update(feedback(losses))
        assert torch.equal(weighter.weights(None), resumed.weights(None))
    assert all(torch.equal(values, copies[key]) for key, values in snapshot.items())


def test_needs_nothing_before_the_backward() -> None:
    assert Uncertainty(2).needs == frozenset()


@pytest.mark.parametrize("argument", ["learning_rate", "max_log_variance"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_arguments_not_above_0_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: must be above 0, found {value}; "):
        Uncertainty(2, **{argument: value})
