"""Weights of the geometric mean of the losses. Shape suffix: M present tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.weighters.loss_rule import LossRule


def gls_weights(losses_M: Tensor) -> Tensor:
    """The gradient of ``(prod_t L_t)^(1/M)`` with respect to each loss [M]: ``GLS / (M L_t)``.

    The mean is taken of the logarithms, since the product of many losses leaves the range of floats.
    """
    return torch.exp(losses_M.log().mean()) / (len(losses_M) * losses_M)


class GLS(LossRule):
    """Minimises the geometric mean of the losses: ``lambda_t ~ GLS / (T L_t)``, so that only relative changes count.

    The present tasks' weights are those of the geometric mean of their losses. Brought to mean 1 they equal those of
    ``LogLoss``: what sets the two apart in the papers, the overall scale, would be a learning rate schedule.

    Source: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
    Learning", CVPR Workshops 2019.

    Args:
        num_tasks: Number of tasks T.
        min_loss: Losses below it count as it [nats per target token]; keeps memorised tasks from taking all weight.

    Raises:
        ValueError: If ``min_loss`` is not above 0.
    """

    def rule(self, losses_M: Tensor) -> Tensor:
        return gls_weights(losses_M)
