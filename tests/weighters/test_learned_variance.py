"""IMTL-L and the bounded uncertainty weights of Liebel and Körner."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters import IMTLL, LiebelKoerner
from mtl.weighters.learned_variance import LearnedVariance

LOSSES = torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)


def feedback(losses_T: Tensor) -> TaskFeedback:
    return TaskFeedback(0, range(len(losses_T)), [1] * len(losses_T), losses_T)


def log_variances_at_the_optimum(weighter: LearnedVariance) -> Tensor:
    for _ in range(3_000):
        weighter.update(feedback(LOSSES))
    found: Tensor = weighter.state_dict()["log_variance"]
    return found


def objective_of(weighter: LearnedVariance, log_variance_T: Tensor, losses_T: Tensor) -> Tensor:
    if isinstance(weighter, IMTLL):
        scale_T = -log_variance_T  # the paper's s
        return (scale_T.exp() * losses_T - scale_T).sum()
    squared_T = log_variance_T.exp()  # the paper's c^2
    return (losses_T / (2 * squared_T) + torch.log(1 + squared_T)).sum()


@pytest.mark.parametrize("weighter", [IMTLL(4), LiebelKoerner(4)])
def test_gradient_agrees_with_autograd_of_the_papers_objective(weighter: LearnedVariance) -> None:
    log_variance_T = torch.tensor([-1.5, -0.2, 0.0, 1.1], dtype=torch.float64, requires_grad=True)
    losses_T = torch.tensor([0.0, 0.4, 2.0, 9.0], dtype=torch.float64)
    objective_of(weighter, log_variance_T, losses_T).backward()
    found_T = weighter.gradient(log_variance_T.detach(), losses_T)
    torch.testing.assert_close(found_T, log_variance_T.grad, rtol=1e-13, atol=1e-15)


def test_golden_weights_of_liebel_and_koerner() -> None:
    weighter = LiebelKoerner(3)
    variance_T = log_variances_at_the_optimum(weighter).exp()
    assert (1 / (2 * variance_T)).tolist() == pytest.approx([2, 0.5, 0.1830127], abs=5e-7)
    torch.testing.assert_close(variance_T, (LOSSES + (LOSSES**2 + 8 * LOSSES).sqrt()) / 4, rtol=1e-6, atol=0)
    expected = torch.tensor([2, 0.5, 0.1830127], dtype=torch.float64)
    torch.testing.assert_close(weighter.weights(None), expected * 3 / expected.sum(), rtol=1e-6, atol=0)


def test_imtl_l_brings_scaled_losses_to_1() -> None:
    weighter = IMTLL(3)
    log_variance_T = log_variances_at_the_optimum(weighter)
    torch.testing.assert_close(torch.exp(-log_variance_T) * LOSSES, torch.ones_like(LOSSES), rtol=1e-6, atol=0)
    torch.testing.assert_close(weighter.weights(None), 3 / LOSSES / (1 / LOSSES).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighter", [IMTLL(2, learning_rate=0.5), LiebelKoerner(2, learning_rate=0.5)])
def test_vanishing_and_huge_losses_are_clamped(weighter: LearnedVariance) -> None:
    for _ in range(200):
        weighter.update(feedback(torch.tensor([0.0, 1e4])))
    assert weighter.state_dict()["log_variance"].tolist() == [-2.5, 2.5]


@pytest.mark.parametrize("weighter", [IMTLL, LiebelKoerner])
@pytest.mark.parametrize("argument", ["learning_rate", "max_log_variance"])
def test_arguments_not_above_0_are_refused(weighter: type[IMTLL], argument: str) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: must be above 0, found 0.0; "):
        weighter(2, **{argument: 0.0})
