"""Weights by the optimal uncertainty, softened. Shape suffix: M present tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.weighters.loss_rule import LossRule


def uwso_weights(losses_M: Tensor, temperature: float) -> Tensor:
    """``softmax(1 / (temperature L))`` [M]."""
    return torch.softmax(1 / (temperature * losses_M), dim=0)


class UWSO(LossRule):
    """Soft optimal uncertainty weights: ``lambda_t ~ softmax_t(1 / (temperature L_t))``.

    ``1 / L_t`` is where learned uncertainty weights arrive; the softmax with a temperature sets how strongly it acts.
    Low temperatures give the whole step to the task of the smallest loss.

    Source: Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning", GCPR 2024 (UW-SO),
    with the weights normalised to mean 1. The paper tunes the temperature for each problem.

    Args:
        num_tasks: Number of tasks T.
        temperature: Above 0 [tokens per nat]; infinite for equal weights.
        min_loss: Losses below it count as it [nats per target token]. With both defaults, ratios of weights stay below
            ``exp(1 / (5 * 0.05)) = 55``.

    Raises:
        ValueError: If the temperature or ``min_loss`` is not above 0.
    """

    def __init__(self, num_tasks: int, temperature: float = 5.0, min_loss: float = 0.05) -> None:
        super().__init__(num_tasks, min_loss)
        if not temperature > 0:
            raise ValueError(f"temperature: must be above 0, found {temperature}; 5 is mild, .inf gives equal weights")
        self._temperature = temperature

    def rule(self, losses_M: Tensor) -> Tensor:
        return uwso_weights(losses_M, self._temperature)
