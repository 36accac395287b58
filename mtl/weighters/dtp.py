"""Weights by how poor the scores still are. Shape suffixes: T tasks, M evaluated tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.loss_average import LossAverage
from mtl.weighters.scale import mean_one, redistributed


def focal_weights(kpi_M: Tensor, gamma: float) -> Tensor:
    """``-(1 - k)^gamma log k`` [M]: falls with the score k in (0, 1], to 0 at 1."""
    return -((1 - kpi_M) ** gamma) * kpi_M.log()


class DTP:
    """Dynamic task prioritization: the focal weight of each task's validation score, so that hard tasks come first.

    ``lambda_t ~ -(1 - k_t)^gamma log k_t``, with ``k_t`` a running mean of the task's score, the paper's key
    performance indicator. Weights change at evaluations only, and only those of the tasks that have a score there.
    They share out what they had; tasks whose metric is none keep a weight of 1.

    Source: Guo et al., "Dynamic Task Prioritization for Multitask Learning", ECCV 2018, its weights of tasks, without
    those of examples. Deviations: one ``gamma`` for all tasks; the floor; weights have mean 1.

    Args:
        num_tasks: Number of tasks T.
        gamma: Focusing exponent, at least 0; larger ones concentrate on the weakest tasks. 2 is usual for focal losses.
        alpha: Weight of the newest score in the mean, in (0, 1]; without the bias of its start.
        min_score: Scores below it count as it, in (0, 1]: the weight would be infinite at 0, where a metric starts that
            nothing gets right by chance.
        floor: Share of the weight, in [0, 1], that is spread evenly, so that a solved task is not switched off.

    Raises:
        ValueError: If an argument is outside its range.
    """

    needs: frozenset[str] = frozenset({"validation", "scores"})

    def __init__(
        self, num_tasks: int, gamma: float = 2.0, alpha: float = 0.5, min_score: float = 0.05, floor: float = 0.1
    ) -> None:
        if not gamma >= 0:
            raise ValueError(f"gamma: must be at least 0, found {gamma}; 2 is usual for focal losses")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: must be in (0, 1], found {alpha}; 1 goes by the newest score alone")
        if not 0 < min_score <= 1:
            raise ValueError(f"min_score: must be in (0, 1], found {min_score}; 0.05 takes smaller scores as 0.05")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor: must be a share in [0, 1], found {floor}; 0.1 spreads 10 % evenly")
        self._gamma = gamma
        self._min_score = min_score
        self._floor = floor
        self._kpis = LossAverage(num_tasks, smoothing=1 - alpha)
        self._weight_T = torch.ones(num_tasks, dtype=torch.float64)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return self._weight_T.clone()

    def update(self, feedback: TaskFeedback) -> None:
        """Takes in the scores of an evaluation, if this is one, and moves the weights of the tasks that have them."""
        results = feedback.validation or {}
        scores = {task: results[task]["score"] for task in sorted(results) if "score" in results[task]}
        if not scores:
            return
        tasks = list(scores)
        self._kpis.add(tasks, torch.tensor(list(scores.values()), dtype=torch.float64))
        kpi_M = self._kpis.mean_T[tasks].clamp(self._min_score, 1.0)
        focal_M = mean_one(focal_weights(kpi_M, self._gamma))
        self._weight_T = redistributed(self._weight_T, tasks, self._floor + (1 - self._floor) * focal_M)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self._weight_T.clone(), "kpis": self._kpis.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight_T.copy_(state["weight"])
        self._kpis.load_state_dict(state["kpis"])
