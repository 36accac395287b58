"""Weights by how validation losses converge. Shape suffixes: T tasks, M evaluated tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.loss_average import InitialLosses
from mtl.weighters.scale import redistributed

# An initial loss so near 0 that its ratio would be noise [nats per target token].
MIN_INITIAL_LOSS = 1e-3


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least-squares line through points (x, y); 0 if all have one x."""
    x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
    x = x - x.mean()
    spread = float(x @ x)
    return float(x @ y) / spread if spread > 0 else 0.0


def relative_scores(slope_M: Tensor) -> Tensor:
    """RCS [M]: ``softmax_i(M a_i / sum_j |a_j|)`` of the tasks' slopes; the slower a task converges, the larger."""
    return torch.softmax(len(slope_M) * slope_M / _total(slope_M), dim=0)


def absolute_scores(histories: Sequence[Sequence[float]]) -> Tensor:
    """ACS [M]: ``softmax_i(-N a_i / sum of its last N |a_i|)``; small for a task that turns away from converging.

    Args:
        histories: Each task's last slopes, the newest at the end.
    """
    slopes = [torch.tensor(history, dtype=torch.float64) for history in histories]
    return torch.softmax(torch.stack([-len(each) * each[-1] / _total(each) for each in slopes]), dim=0)


def divergence_factor(largest_slopes: Sequence[float], tau: float) -> float:
    """DF: ``min(1, t softmax_t(-tau t a_max(t) / sum |a_max|))``, the softmax over time; small once a task diverges.

    Args:
        largest_slopes: ``a_max``, the largest slope among the tasks at each time, the newest at the end.
        tau: Temperature.
    """
    slopes = torch.tensor(largest_slopes, dtype=torch.float64)
    softmax = torch.softmax(-tau * len(slopes) * slopes / _total(slopes), dim=0)
    return min(1.0, len(slopes) * float(softmax[-1]))


class CoBa:
    """Convergence balancer: slow tasks get more weight while all converge, and diverging tasks less once one does.

    ``lambda = T (DF RCS + (1 - DF) ACS)``, from the slopes of the tasks' validation losses over their losses before
    training: the relative scores (RCS) favour tasks that converge slowly, the absolute ones (ACS) those that converge
    as they used to, and the divergence factor (DF) goes from the former to the latter when the largest slope rises.

    It reads the run's own evaluations and makes no forward for itself, so it costs what these cost; weights change at
    evaluations only. The paper evaluates a batch at every step, at a quarter to a third more time: for faster answers
    set a smaller ``eval_steps``, and a longer window with it.

    A slope is that of a least-squares line over a task's last evaluations at the steps where they took place, so a task
    that was not evaluated for a while does not seem steeper. In a later stage the first one reaches from the untrained
    model to the stage's start.

    Source: Gong et al., "CoBa: Convergence Balancer for Multitask Finetuning of Large Language Models", EMNLP 2024, in
    the form of the paper: DF is at most 1, and there is no further softmax over the weights, as in the authors' code.
    Deviations: window and warm-up count evaluations, not steps; the floor, which in the code acts only once a weight is
    below it; weights have mean 1.

    Args:
        num_tasks: Number of tasks T.
        window: Evaluations that a slope is fitted to, and slopes that ACS compares, at least 2. The authors advise 2 to
            5 times the warm-up.
        tau: Temperature of the divergence factor, at least 0.
        warmup: Evaluations of a task, with that before training, until its weight moves; at least 2, which is when
            there is a slope.
        min_weight: Least weight while all tasks are evaluated, in [0, 1].

    Raises:
        ValueError: If an argument is outside its range.
    """

    needs: frozenset[str] = frozenset({"validation"})

    def __init__(
        self, num_tasks: int, window: int = 5, tau: float = 5.0, warmup: int = 2, min_weight: float = 0.1
    ) -> None:
        if window < 2:
            raise ValueError(f"window: must be at least 2 evaluations, found {window}; a slope needs two")
        if not tau >= 0:
            raise ValueError(f"tau: must be at least 0, found {tau}; the paper takes 5")
        if warmup < 2:
            raise ValueError(f"warmup: must be at least 2 evaluations, found {warmup}; a slope needs two")
        if not 0 <= min_weight <= 1:
            raise ValueError(f"min_weight: must be in [0, 1], found {min_weight}; 0.1 leaves a task a tenth of its own")
        self._window = window
        self._tau = tau
        self._warmup = warmup
        self._min_weight = min_weight
        self._initial_losses = InitialLosses(num_tasks)
        self._points_T: list[list[tuple[int, float]]] = [[] for _ in range(num_tasks)]
        self._num_evaluations_T = [0] * num_tasks
        self._slopes_T: list[list[float]] = [[] for _ in range(num_tasks)]
        self._largest_slopes: list[float] = []
        self._weight_T = torch.ones(num_tasks, dtype=torch.float64)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        return self._weight_T.clone()

    def update(self, feedback: TaskFeedback) -> None:
        """Takes in the losses of an evaluation, if this is one, and moves the weights of the evaluated tasks."""
        if not feedback.validation:
            return
        self._initial_losses.add(feedback)
        tasks = [
            task
            for task, result in sorted(feedback.validation.items())
            if self._add_point(task, feedback.step, result["loss"])
        ]
        if not tasks:
            return
        slope_M = torch.tensor([self._slopes_T[task][-1] for task in tasks], dtype=torch.float64)
        self._largest_slopes.append(float(slope_M.max()))
        factor = divergence_factor(self._largest_slopes, self._tau)
        absolute_M = absolute_scores([self._slopes_T[task] for task in tasks])
        score_M = len(tasks) * (factor * relative_scores(slope_M) + (1 - factor) * absolute_M)
        self._weight_T = redistributed(self._weight_T, tasks, self._min_weight + (1 - self._min_weight) * score_M)

    def state_dict(self) -> dict[str, Any]:
        return {
            "initial_losses": self._initial_losses.state_dict(),
            "points": [[list(point) for point in points] for points in self._points_T],
            "num_evaluations": list(self._num_evaluations_T),
            "slopes": [list(slopes) for slopes in self._slopes_T],
            "largest_slopes": list(self._largest_slopes),
            "weight": self._weight_T.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._initial_losses.load_state_dict(state["initial_losses"])
        self._points_T = [[(step, ratio) for step, ratio in points] for points in state["points"]]
        self._num_evaluations_T = list(state["num_evaluations"])
        self._slopes_T = [list(slopes) for slopes in state["slopes"]]
        self._largest_slopes = list(state["largest_slopes"])
        self._weight_T.copy_(state["weight"])

    def _add_point(self, task: int, step: int, loss: float) -> bool:
        """Adds an evaluation of a task, and whether its weight is to move by it."""
        if not math.isfinite(loss):
            return False
        points = self._points_T[task]
        if points and points[-1][0] == step:  # the same model once more, as at the start of a run
            return False
        initial = max(float(self._initial_losses.loss_T[task]), MIN_INITIAL_LOSS)
        self._points_T[task] = [*points, (step, loss / initial)][-self._window :]
        self._num_evaluations_T[task] += 1
        if self._num_evaluations_T[task] < self._warmup:
            return False
        self._slopes_T[task] = [*self._slopes_T[task], slope(self._points_T[task])][-self._window :]
        return True


def _total(slopes: Tensor) -> float:
    """Sum of the absolute slopes; 1 if all are 0, where none of them says anything."""
    return float(slopes.abs().sum()) or 1.0
