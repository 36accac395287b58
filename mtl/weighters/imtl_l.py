"""Weights that bring all losses to one scale. Shape suffix: M present tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.weighters.learned_variance import LearnedVariance


class IMTLL(LearnedVariance):
    """Learns scales ``exp(-s_t)`` that bring every scaled loss ``exp(-s_t) L_t`` to 1, and weighs by them.

    The ``s`` minimise ``sum_t exp(-s_t) L_t + s_t`` over the unweighted losses: gradient ``1 - exp(-s_t) L_t``, optimum
    ``s_t = log L_t``, where ``lambda_t ~ 1 / L_t``. After normalisation that is where ``Uncertainty`` arrives too; the
    way there differs. They are stepped by Adam of their own, without decay, clipping or schedule; an absent task's
    stays as it is.

    Source: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, loss balance (IMTL-L), whose ``s`` is the
    negative of this one and is learned by the model's optimizer. Weights are normalised to mean 1 here, so that they
    are no learning rate schedule.

    Args:
        num_tasks: Number of tasks T.
        learning_rate: Adam's step size for ``s``, about its change in one step while the losses keep their side of the
            optimum.
        max_log_variance: Bound on ``|s|``. A memorised task's loss goes to 0 and its weight would explode as ``1 / L``;
            2.5 treats losses below 0.08 and above 12 nats per token as these, and bounds ratios of weights by 148.

    Raises:
        ValueError: If the learning rate or the bound is not above 0.
    """

    def gradient(self, log_variance_M: Tensor, losses_M: Tensor) -> Tensor:
        return 1 - torch.exp(-log_variance_M) * losses_M
