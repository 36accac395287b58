from __future__ import annotations

import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.weighters import GradNorm
from mtl.weighters.gradnorm import gradnorm_gradient


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def update(weighter: GradNorm, norms: dict[int, float], losses: dict[int, float] | None = None) -> None:
    losses_M = double(*((losses or dict.fromkeys(norms, 1.0)).values()))
    norm_M = double(*norms.values())
    cosines_MM = torch.full((len(norm_M), len(norm_M)), 0.3, dtype=torch.float64).fill_diagonal_(1.0)
    gramian_MM = norm_M[:, None] * cosines_MM * norm_M
    weighter.update(TaskFeedback(0, list(norms), [1] * len(norms), losses_M, gramian_MM=gramian_MM))


def mean_of_last(
    weighter: GradNorm, norms: dict[int, float], losses: dict[int, float], num_steps: int = 600
) -> torch.Tensor:
    """The weights hover around their target: their mean over the later half of the steps."""
    rows = []
    for _ in range(num_steps):
        update(weighter, norms, losses)
        rows.append(weighter.weights(None))
    return torch.stack(rows[num_steps // 2 :]).mean(dim=0)


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
def test_gradient_agrees_with_autograd_of_the_papers_loss(alpha: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        weight_M, norm_M, ratio_M = 0.1 + torch.rand(3, 5, dtype=torch.float64, generator=generator)
        weight_M.requires_grad_()
        relative_M = ratio_M / ratio_M.mean()
        weighted_M = weight_M * norm_M
        target_M = (weighted_M.mean() * relative_M**alpha).detach()
        (weighted_M - target_M).abs().sum().backward()
        found_M = gradnorm_gradient(weight_M.detach(), norm_M, ratio_M, alpha)
        torch.testing.assert_close(found_M, weight_M.grad, rtol=1e-14, atol=0)


def test_first_step_moves_by_the_learning_rate_and_is_rescaled() -> None:
    weighter = GradNorm(3, learning_rate=0.1)
    update(weighter, {0: 1.0, 1: 2.0, 2: 6.0})  # mean norm 3
    torch.testing.assert_close(weighter.weights(None), double(1.1, 1.1, 0.9) * 3 / 3.1, rtol=1e-6, atol=0)


def test_without_alpha_weighted_norms_become_equal() -> None:
    norms = {0: 0.5, 1: 1.0, 2: 4.0}
    found = mean_of_last(GradNorm(3, alpha=0.0, learning_rate=0.005), norms, dict.fromkeys(norms, 1.0), 2_000)
    weighted = found * double(*norms.values())
    torch.testing.assert_close(weighted, weighted.mean().expand(3), rtol=0.03, atol=0)


def test_tasks_that_have_learned_less_get_larger_norms() -> None:
    weighter, norms = GradNorm(2, alpha=1.0, learning_rate=0.005), {0: 1.0, 1: 1.0}
    update(weighter, norms, {0: 2.0, 1: 2.0})
    found = mean_of_last(weighter, norms, {0: 1.5, 1: 0.5})  # three quarters and one quarter of L(0) left
    torch.testing.assert_close(found, double(1.5, 0.5), rtol=0.03, atol=0)


def test_progress_counts_from_the_evaluation_before_training() -> None:
    weighter = GradNorm(2, alpha=1.0)
    before = {task: {"loss": loss} for task, loss in enumerate([1.0, 4.0])}
    weighter.update(TaskFeedback(0, (), (), torch.zeros(0), validation=before))
    update(weighter, {0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})  # nothing learned of task 0
    weights = weighter.weights(None)
    assert weights[0] > 1 > weights[1]


def test_weights_never_fall_to_0() -> None:
    weighter = GradNorm(2, min_weight=0.2, learning_rate=0.3)
    for _ in range(100):
        update(weighter, {0: 1e-6, 1: 1e6})
    torch.testing.assert_close(weighter.weights(None), double(1.8, 0.2), rtol=0.15, atol=0)
    assert weighter.weights(None)[1] > 0.15


def test_tasks_without_gradient_do_not_move() -> None:
    weighter = GradNorm(3)
    for _ in range(5):
        update(weighter, {0: 0.0, 1: 0.0, 2: 0.0})
    assert weighter.weights(None).tolist() == [1, 1, 1]


def test_huge_and_vanishing_losses_stay_finite() -> None:
    weighter = GradNorm(2)
    for losses in ([0.0, 1e-12], [1e5, 0.0], [0.0, 0.0]):
        update(weighter, {0: 1.0, 1: 1.0}, dict(enumerate(losses)))
    assert weighter.weights(None).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.5}, "alpha: must be at least 0, found -0.5; "),
        ({"learning_rate": 0.0}, "learning_rate: must be above 0, found 0.0; "),
        ({"min_weight": 0.0}, r"min_weight: must be in \(0, 1\], found 0.0; "),
        ({"min_loss": 0.0}, "min_loss: must be above 0 nats per token, found 0.0; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        GradNorm(2, **arguments)
