"""Weights of the sum of log losses. Shape suffix: M present tasks."""

from __future__ import annotations

from torch import Tensor

from mtl.weighters.loss_rule import LossRule


class LogLoss(LossRule):
    """Minimises ``sum_t log L_t``: ``lambda_t ~ 1 / L_t``, so that a change of a loss's scale changes nothing.

    It is where learned uncertainty weights arrive, without learning: at once, but with the noise of a step's losses.

    Source: the scale-invariant baseline of Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, with
    the weights normalised to mean 1 so that they are no learning rate schedule.

    Args:
        num_tasks: Number of tasks T.
        min_loss: Losses below it count as it [nats per target token]; keeps memorised tasks from taking all weight.

    Raises:
        ValueError: If ``min_loss`` is not above 0.
    """

    def rule(self, losses_M: Tensor) -> Tensor:
        return 1 / losses_M
