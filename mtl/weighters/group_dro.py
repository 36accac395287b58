"""Weights of the worst mixture of tasks. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.exponentiated import check_step, exponentiated
from mtl.weighters.reference_losses import loss_of_each_task


class GroupDRO:
    """Group distributionally robust optimization: weight moves to the tasks with the largest losses.

    Every step takes ``lambda_t <- lambda_t exp(eta (L_t - reference_t))``, up to the scale, then spreads the share
    ``floor`` evenly. A language model's losses differ first of all by what can't be reduced: free text has more entropy
    than labels. On raw losses (``references=0``) the weight chases the task with the most entropy, whatever there is to
    gain; with references, losses that each task can reach, it goes to the task that is farthest behind. The floor
    bounds the damage: under constant losses the weights settle near ``floor / (floor + eta (c - L_t + reference_t))``
    with a constant c, so at ``floor = eta`` a task one nat below c keeps half of an equal weight.

    Source: Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020, Algorithm 1; with
    baseline losses as in Oren et al., "Distributionally Robust Language Modeling", EMNLP 2019. Deviations: the floor
    (0 is the paper's); weights have mean 1 instead of sum 1; they act from the next step on, so that no task's gradient
    has to be kept apart; absent tasks keep their weights; no adjustment by the sizes of the groups.

    Args:
        num_tasks: Number of tasks T.
        names: Names of the T tasks; needed to read a mapping of references.
        eta: Step size of the weights' logarithms per nat, above 0.
        references: Losses subtracted from the tasks' [nats per target token]: one for all, which changes nothing, or a
            mapping from task name (0 for tasks it does not name), such as losses of single-task runs.
        floor: Share of the present tasks' weight that is spread evenly over them in every step, in [0, 1].

    Raises:
        ValueError: If an argument is outside its range, or the references name an unknown task.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        num_tasks: int,
        names: Sequence[str] | None = None,
        eta: float = 0.01,
        references: float | Mapping[str, float] = 0.0,
        floor: float = 0.01,
    ) -> None:
        check_step(eta, floor)
        self._eta = eta
        self._floor = floor
        self._reference_T = loss_of_each_task("references", references, names, num_tasks)
        self._weight_T = torch.ones(num_tasks, dtype=torch.float64)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return self._weight_T.clone()

    def update(self, feedback: TaskFeedback) -> None:
        """Moves the weights of the present tasks by one step."""
        losses_M = feedback.losses_M.detach().to("cpu", torch.float64)
        gain_M = self._eta * (losses_M - self._reference_T[list(feedback.tasks)])
        self._weight_T = exponentiated(self._weight_T, feedback.tasks, gain_M, self._floor)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight_T.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight_T.copy_(state["weight"])
