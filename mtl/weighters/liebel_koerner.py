"""Weights by the uncertainty of a task, with a bounded objective. Shape suffix: M present tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.weighters.learned_variance import LearnedVariance


class LiebelKoerner(LearnedVariance):
    """Uncertainty weights with a weaker pull towards easy tasks: ``1 / sqrt(L)`` instead of ``1 / L`` for small losses.

    The variances ``c^2`` minimise ``sum_t L_t / (2 c_t^2) + log(1 + c_t^2)``, which is never negative, and weigh the
    losses by ``1 / (2 c^2)``, brought to mean 1. Here ``s = log c^2`` is what is learned, so that c cannot cross 0: its
    gradient is ``sigmoid(s) - exp(-s) L / 2``, and the optimum ``c^2 = (L + sqrt(L^2 + 8 L)) / 4``. The log-variances
    are stepped by Adam of their own, without decay, clipping or schedule; an absent task's stays as it is.

    Source: Liebel and Körner, "Auxiliary Tasks in Multi-task Learning", arXiv 1805.06334, 2018, with the weights
    normalised to mean 1 so that they are no learning rate schedule.

    Args:
        num_tasks: Number of tasks T.
        learning_rate: Adam's step size for ``s``, about its change in one step while the losses keep their side of the
            optimum.
        max_log_variance: Bound on ``|s|``; 2.5 treats losses below 0.012 and above 22 nats per token as these, and
            bounds ratios of weights by 148.

    Raises:
        ValueError: If the learning rate or the bound is not above 0.
    """

    def gradient(self, log_variance_M: Tensor, losses_M: Tensor) -> Tensor:
        return torch.sigmoid(log_variance_M) - torch.exp(-log_variance_M) * losses_M / 2
