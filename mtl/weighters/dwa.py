"""Weights by how fast losses fall. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters.loss_floor import check_min_loss, floored


def dwa_weights(rate_T: Tensor, temperature: float) -> Tensor:
    """``T softmax(rate / temperature)``."""
    return len(rate_T) * torch.softmax(rate_T / temperature, dim=0)


class DWA:
    """Dynamic weight average: tasks whose loss falls slowly get more weight, ``lambda = T softmax(r / temperature)``.

    ``r_t`` is a task's mean loss in its last window over that in the window before; 1 until there are two. A window is
    ``window`` steps *with the task*, or as many as bring ``window_tokens`` of its target tokens, and its mean is over
    the target tokens seen in them. The paper's windows are epochs; mixtures of tasks have none in common, and single
    steps would be noise. A task without two windows has weight 1, the others share the rest, so an absent task's weight
    moves only as far as the mean of 1 asks for.

    Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, dynamic weight average.

    Args:
        num_tasks: Number of tasks T.
        temperature: Above 0; large ones give equal weights. At the paper's 2 the method acts softly: rates of 1 and 0.5
            give weights of 1.12 and 0.88.
        window: Steps with the task in a window.
        window_tokens: Target tokens of the task in a window, instead: tasks of long answers then have windows of fewer
            steps, and all windows are equally free of noise. ``None`` for windows of steps.
        min_loss: Mean losses below it count as it [nats per target token]: the rate of a memorised task is noise.

    Raises:
        ValueError: If the temperature or ``min_loss`` is not above 0, or a window below 1.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        num_tasks: int,
        temperature: float = 2.0,
        window: int = 25,
        window_tokens: int | None = None,
        min_loss: float = 0.05,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature: must be above 0, found {temperature}; 2 is the paper's")
        if window < 1:
            raise ValueError(f"window: must be at least 1 step with the task, found {window}; 25 averages out noise")
        if window_tokens is not None and window_tokens < 1:
            raise ValueError(f"window_tokens: must be at least 1, found {window_tokens}; null means windows of steps")
        check_min_loss(min_loss)
        self._temperature = temperature
        self._window = window
        self._window_tokens = window_tokens
        self._min_loss = min_loss
        self._sum_T = torch.zeros(num_tasks, dtype=torch.float64)  # of losses, each times its number of target tokens
        self._num_tokens_T = torch.zeros(num_tasks, dtype=torch.int64)
        self._num_steps_T = torch.zeros(num_tasks, dtype=torch.int64)
        self._last_T = torch.zeros(num_tasks, dtype=torch.float64)  # mean loss of a window; 0 where there is none yet
        self._before_last_T = torch.zeros(num_tasks, dtype=torch.float64)

    def weights(self, feedback: TaskFeedback | None) -> Tensor:
        measured_T = self._before_last_T > 0
        weight_T = torch.ones(len(measured_T), dtype=torch.float64)
        rate = self._last_T[measured_T] / self._before_last_T[measured_T]
        weight_T[measured_T] = dwa_weights(rate, self._temperature)
        return weight_T

    def update(self, feedback: TaskFeedback) -> None:
        """Adds the step to the present tasks' windows, and closes those that are full.

        Raises:
            ValueError: If windows are of tokens, and the feedback does not say how many there were.
        """
        counts = feedback.num_targets_M
        if counts is None:
            if self._window_tokens is not None and feedback.tasks:
                raise ValueError("num_targets_M: must be given for window_tokens, found None; set window instead")
            counts = feedback.counts_M
        present = torch.tensor(list(feedback.tasks), dtype=torch.int64)
        counts_M = torch.tensor(list(counts), dtype=torch.int64)
        self._sum_T[present] += counts_M * feedback.losses_M.detach().to("cpu", torch.float64)
        self._num_tokens_T[present] += counts_M
        self._num_steps_T[present] += 1

        needed = self._window_tokens
        full_T = self._num_steps_T >= self._window if needed is None else self._num_tokens_T >= needed
        self._before_last_T[full_T] = self._last_T[full_T]
        self._last_T[full_T] = floored(self._sum_T[full_T] / self._num_tokens_T[full_T], self._min_loss)
        for running_T in (self._sum_T, self._num_tokens_T, self._num_steps_T):
            running_T[full_T] = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "sum": self._sum_T.clone(),
            "num_tokens": self._num_tokens_T.clone(),
            "num_steps": self._num_steps_T.clone(),
            "last": self._last_T.clone(),
            "before_last": self._before_last_T.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum_T.copy_(state["sum"])
        self._num_tokens_T.copy_(state["num_tokens"])
        self._num_steps_T.copy_(state["num_steps"])
        self._last_T.copy_(state["last"])
        self._before_last_T.copy_(state["before_last"])
