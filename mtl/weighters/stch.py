"""Weights of a smooth maximum. Shape suffix: M present tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.progress_rule import ProgressRule
from mtl.weighters.reference_losses import loss_of_each_task
from mtl.weighters.scale import redistributed


def stch_weights(objectives_M: Tensor, mu: float) -> Tensor:
    """The gradient of the smooth maximum ``mu log sum_t exp(f_t / mu)`` with respect to each objective f [M]."""
    return torch.softmax(objectives_M / mu, dim=0)


class STCH(ProgressRule):
    """Smooth Tchebycheff: minimises a smooth maximum over the tasks, so that the worst one counts most.

    The objective is ``mu log sum_t exp(f_t / mu)`` with ``f_t = log((L_t - z_t) / nadir_t)``. It lies between ``max f``
    and ``max f + mu log T``, and its gradient's weights are ``softmax(f / mu)_t / (L_t - z_t)``. The nadir is a task's
    mean ``L_t - z_t`` over its warm-up; until then ``f_t`` counts as 0, so a run starts with the sum of log losses. The
    maximum is thus over what part of its start a task still has to go, not over raw losses, of which a language model's
    are largest for the tasks with the most entropy; an ideal loss ``z_t`` takes that entropy out of the parts too.

    At ``mu = 1`` the two factors cancel into constant weights ``1 / nadir_t``. Below 1 the tasks that are behind gain;
    above, those that are ahead.

    ``relative=False`` is the paper's form: ``f_t = L_t - z_t`` and weights ``softmax(f / mu)``, from the first step on.

    Source: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024, with the warm-up
    and logarithm of the authors' multi-task code. Deviations: the paper's preferences are equal; the code's ``mu`` of 1
    is not the default, as its weights would not move (the paper tries 0.01 to 1); the warm-up is counted in steps with
    the task, all of which are averaged, where the code has four epochs before the one it averages; weights have mean 1.

    Args:
        num_tasks: Number of tasks T.
        names: Names of the T tasks; needed to read a mapping of ideal losses.
        mu: Smoothing, above 0. Towards 0 the worst task takes all weight.
        relative: Whether tasks are compared by what part of their start they still have to go; otherwise by nats.
        z: Ideal point, the loss a task could come to at best [nats per target token]: one for all, or a mapping from
            task name (0 for tasks it does not name).
        warmup: Steps with the task whose mean is its nadir.
        min_loss: Least ``L_t - z_t`` [nats per target token]; keeps memorised tasks from taking all weight at first.

    Raises:
        ValueError: If an argument is outside its range, or ``z`` names an unknown task.
    """

    def __init__(
        self,
        num_tasks: int,
        names: Sequence[str] | None = None,
        mu: float = 0.5,
        relative: bool = True,
        z: float | Mapping[str, float] = 0.0,
        warmup: int = 50,
        min_loss: float = 0.05,
    ) -> None:
        if not mu > 0:
            raise ValueError(f"mu: must be above 0, found {mu}; 0.5 favours the worst tasks, 0.1 nearly only these")
        super().__init__(loss_of_each_task("z", z, names, num_tasks), warmup, min_loss)
        self._mu = mu
        self._relative = relative

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        if feedback is None or self._relative:
            return super().weights(feedback)
        return redistributed(self._weight_T, feedback.tasks, stch_weights(self._excess(feedback), self._mu))

    def rule(self, progress_M: Tensor) -> Tensor:
        return stch_weights(progress_M.log(), self._mu)
