"""Weights that give all tasks one gradient norm. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.loss_average import LossAverage
from mtl.weighters.loss_floor import check_min_loss, floored
from mtl.weighters.scale import redistributed


def max_norm_scales(norm_M: Tensor, max_scale: float = math.inf) -> Tensor:
    """Factors, at most ``max_scale``, that bring vectors of these norms to the largest of them [M]; 0 if all are 0."""
    largest = norm_M.max()
    return largest / norm_M.clamp(min=max(float(largest) / max_scale, sys.float_info.min))


class DBMTL:
    """Dual balancing: gradients of the log losses, each scaled to the largest norm among them.

    With ``n_t`` a running mean of ``|g_t| / L_t``, the norm of the gradient of ``log L_t``, the weights are
    ``lambda_t ~ max_j(n_j) / n_t / L_t``. At ``beta = 0`` this is ``1 / |g_t|`` up to a common factor, and the present
    tasks' ``lambda_t g_t`` have equal norms; so have their parts of the objective if their shares of it are equal too.

    Both factors grow without bound for a memorised task, which has neither loss nor gradient. ``min_loss`` bounds the
    second one, ``max_scale`` the first: a task below both fades out instead of filling its part with noise.

    Source: Lin et al., "Dual-Balancing for Multi-Task Learning", arXiv 2308.12029, 2023. Deviation: the paper averages
    the gradients themselves over steps, scales and applies these averages; here only their norms are averaged, and the
    step's own gradients applied, so momentum is left to the optimizer and nothing of the gradients' size is kept. With
    ``beta > 0`` the norms are equal on average over steps, not in each one.

    Args:
        num_tasks: Number of tasks T.
        beta: Decay of the mean of the norms per step with the task, in [0, 1); without the bias of its start.
        min_loss: Losses below it count as it [nats per target token].
        max_scale: Largest factor ``max_j(n_j) / n_t``, at least 1; 1 leaves the sum of log losses.

    Raises:
        ValueError: If an argument is outside its range.
    """

    needs: frozenset[str] = frozenset({"losses", "gramian"})

    def __init__(self, num_tasks: int, beta: float = 0.9, min_loss: float = 0.05, max_scale: float = 100.0) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta: must be in [0, 1), found {beta}; 0.9 averages about 10 steps")
        check_min_loss(min_loss)
        if not max_scale >= 1:
            raise ValueError(f"max_scale: must be at least 1, found {max_scale}; 100 lets a memorised task fade out")
        self._min_loss = min_loss
        self._max_scale = max_scale
        self._norms = LossAverage(num_tasks, beta)
        self._weight_T = torch.ones(num_tasks, dtype=torch.float64)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        if feedback is None or not feedback.tasks:
            return self._weight_T.clone()
        norm_M = self._norms_with(feedback).mean_T[list(feedback.tasks)]
        raw_M = max_norm_scales(norm_M, self._max_scale) / floored(feedback.losses_M, self._min_loss)
        return redistributed(self._weight_T, feedback.tasks, raw_M)

    def update(self, feedback: TaskFeedback) -> None:
        """Takes in the step's norms, and remembers its weights for the tasks that will be absent."""
        if feedback.tasks:
            self._weight_T = self.weights(feedback)
            self._norms = self._norms_with(feedback)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight_T.clone(), "norms": self._norms.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight_T.copy_(state["weight"])
        self._norms.load_state_dict(state["norms"])

    def _norms_with(self, feedback: TaskFeedback) -> LossAverage:
        """The means of the log losses' gradient norms as they are after this step."""
        assert feedback.gramian_MM is not None, "the weighter declares that it needs the gramian"
        norm_M = feedback.gramian_MM.detach().to("cpu", torch.float64).diagonal().clamp(min=0).sqrt()
        norms = copy.deepcopy(self._norms)
        norms.add(feedback.tasks, norm_M / floored(feedback.losses_M, self._min_loss))
        return norms
