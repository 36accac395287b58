"""Weights by the uncertainty of a task. Shape suffix: M present tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.weighters.learned_variance import LearnedVariance


class Uncertainty(LearnedVariance):
    """Weighs each task by a learned precision: ``lambda = T exp(-s) / sum exp(-s)``.

    The log-variances ``s`` minimise ``sum_t exp(-s_t) L_t + s_t / 2`` over the unweighted losses, so their gradient is
    ``1/2 - exp(-s_t) L_t`` in closed form and the optimum ``s_t = log(2 L_t)`` gives ``lambda_t ~ 1 / L_t``: the scale
    of a task's loss cancels. They are stepped by Adam of their own, without decay, clipping or schedule; an absent
    task's log-variance and moments stay as they are.

    Source: Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018, Eq. 10
    (classification term), with the weights normalised to mean 1 so that they are no learning rate schedule.

    Args:
        num_tasks: Number of tasks T.
        learning_rate: Adam's step size for ``s``, about its change in one step while the losses keep their side of the
            optimum. 0.025 takes ``s`` across the range of usual losses in some 50 steps, and averages over as many.
        max_log_variance: Bound on ``|s|``. A memorised task's loss goes to 0 and its weight would explode as ``1 / L``;
            2.5 treats losses below 0.04 and above 6.1 nats per token as these, and bounds ratios of weights by 148.

    Raises:
        ValueError: If the learning rate or the bound is not above 0.
    """

    def gradient(self, log_variance_M: Tensor, losses_M: Tensor) -> Tensor:
        return 0.5 - torch.exp(-log_variance_M) * losses_M
