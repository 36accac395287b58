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
    ``window`` steps *with the task*, and its mean is over the examples seen in them. The paper's windows are epochs;
    mixtures of tasks have none in common, and single steps would be noise. A task without two windows has weight 1, the
    others share the rest, so an absent task's weight moves only as far as the mean of 1 asks for.

    Source: Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, dynamic weight average.

    Args:
        num_tasks: Number of tasks T.
        temperature: Above 0; large ones give equal weights. At the paper's 2 the method acts softly: rates of 1 and 0.5
            give weights of 1.12 and 0.88.
        window: Steps with the task in a window.
        min_loss: Mean losses below it count as it [nats per target token]: the rate of a memorised task is noise.

    Raises:
        ValueError: If the temperature or ``min_loss`` is not above 0, or the window below 1.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, num_tasks: int, temperature: float = 2.0, window: int = 25, min_loss: float = 0.05) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature: must be above 0, found {temperature}; 2 is the paper's")
        if window < 1:
            raise ValueError(f"window: must be at least 1 step with the task, found {window}; 25 averages out noise")
        check_min_loss(min_loss)
        self._temperature = temperature
        self._window = window
        self._min_loss = min_loss
        self._sum_T = torch.zeros(num_tasks, dtype=torch.float64)  # of losses, each times its number of examples
        self._num_examples_T = torch.zeros(num_tasks, dtype=torch.int64)
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
        """Adds the step to the present tasks' windows, and closes those that are full."""
        present = torch.tensor(list(feedback.tasks), dtype=torch.int64)
        counts_M = torch.tensor(list(feedback.counts_M), dtype=torch.int64)
        self._sum_T[present] += counts_M * feedback.losses_M.detach().to("cpu", torch.float64)
        self._num_examples_T[present] += counts_M
        self._num_steps_T[present] += 1

        full_T = self._num_steps_T == self._window
        self._before_last_T[full_T] = self._last_T[full_T]
        self._last_T[full_T] = floored(self._sum_T[full_T] / self._num_examples_T[full_T], self._min_loss)
        for running_T in (self._sum_T, self._num_examples_T, self._num_steps_T):
            running_T[full_T] = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "sum": self._sum_T.clone(),
            "num_examples": self._num_examples_T.clone(),
            "num_steps": self._num_steps_T.clone(),
            "last": self._last_T.clone(),
            "before_last": self._before_last_T.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum_T.copy_(state["sum"])
        self._num_examples_T.copy_(state["num_examples"])
        self._num_steps_T.copy_(state["num_steps"])
        self._last_T.copy_(state["last"])
        self._before_last_T.copy_(state["before_last"])
