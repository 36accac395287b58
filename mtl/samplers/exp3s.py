"""Sampling by a bandit whose best arm may change. Shape suffix: T tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import TaskFeedback
from mtl.samplers.draws import checked_sizes
from mtl.samplers.moving import MovingMixture, softmax
from mtl.samplers.rewards import reward_source
from mtl.samplers.running_scale import RunningScale


class Exp3S(MovingMixture):
    """Samples the tasks more often that training on brings more now: ``p = (1 - floor) softmax(w) + floor / T``.

    Every reward is rescaled to r in [-1, 1] by the 20 % and 80 % quantiles of all rewards so far. With the estimates
    ``e_t = (r_t n_t / B + beta) / p_t``, where n_t of the B examples are the task's, and ``alpha = 1 / k`` at the k-th
    log-weights, some of every task's weight is handed to the others, so that a task that was of no use can come back::

        w_t <- log((1 - alpha) exp(w_t + eta e_t) + alpha / (T - 1) sum_{j != t} exp(w_j + eta e_j))

    Source: Graves et al., "Automated Curriculum Learning for Neural Networks", ICML 2017, sec. 2.2 and 2.3, after
    Exp3.S of Auer et al. (2002). Deviations: a step draws B arms at once; the fall of the loss is taken relative to the
    loss and to the task's share of the step, not to the length of the example.

    Args:
        sizes: Training examples of each task [T]; only their number matters.
        reward: ``"loss_decrease"``: relative fall of the loss of a step's examples by that step, which costs a forward
            more per step; ``"gap_closed"``: relative fall of the validation loss from one evaluation to the next. Both
            per example: a task is not worth more because more of it was drawn.
        eta: Step size, above 0. The paper's suits some 1e5 steps.
        beta: Added to every reward, at least 0; raises the tasks that are sampled little.
        floor: The paper's epsilon, in (0, 1]: share of the examples that is spread evenly over all tasks.
        warmup: Steps that are drawn evenly before the probabilities move.
        smoothing: Weight of the old probabilities in every move, in [0, 1).
        reservoir_size: Rewards kept for the quantiles, at least 1.
        seed: Of the generator of the sample of rewards; also orders ties between equal tasks.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        reward: Literal["loss_decrease", "gap_closed"] = "loss_decrease",
        eta: float = 1e-3,
        beta: float = 0.0,
        floor: float = 0.05,
        warmup: int = 0,
        smoothing: float = 0.0,
        reservoir_size: int = 1000,
        seed: int = 0,
    ) -> None:
        if not 0 < eta < math.inf:
            raise ValueError(f"eta: must be above 0 and finite, found {eta}; 0.05 suits a thousand steps")
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta: must be at least 0 and finite, found {beta}; the paper takes 0")
        if not 0 < floor <= 1:
            raise ValueError(f"floor: must be above 0 and at most 1, found {floor}; estimates divide by p, take 0.05")
        num_tasks = len(checked_sizes(sizes))
        self._rewards = reward_source(reward, num_tasks)
        self.needs = self._rewards.needs
        self._eta = eta
        self._beta = beta
        self._scale = RunningScale(reservoir_size, seed)
        self._log_weights_T = np.zeros(num_tasks)
        self._index = 1  # of these log-weights: the paper calls the first ones w_1
        super().__init__(np.ones(num_tasks), floor=floor, warmup=warmup, smoothing=smoothing, seed=seed)

    def _shares(self, feedback: TaskFeedback) -> NDArray[np.float64] | None:
        reward = self._rewards.collect(feedback, self.probabilities)
        if reward is None:
            return None
        rewards_M = 2 * self._scale(reward.gains_M) - 1
        estimates_T = self._beta / np.array(self.probabilities)
        estimates_T[list(reward.tasks)] += rewards_M * reward.importance_M
        self._index += 1
        self._log_weights_T = shared_out(self._log_weights_T + self._eta * estimates_T, 1 / self._index)
        self._note("reward", dict(zip(reward.tasks, rewards_M.tolist(), strict=True)))
        return softmax(self._log_weights_T)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "log_weights": self._log_weights_T.tolist(),
            "index": self._index,
            "scale": self._scale.state_dict(),
            "rewards": self._rewards.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._log_weights_T = np.array(state["log_weights"])
        self._index = state["index"]
        self._scale.load_state_dict(state["scale"])
        self._rewards.load_state_dict(state["rewards"])


def shared_out(log_weights_T: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Log-weights after each task has handed the share ``alpha`` of its weight to the others, in equal parts.

    ``log((1 - alpha) exp w_t + alpha / (T - 1) sum_{j != t} exp w_j)``; a single task keeps all of its weight.
    """
    if len(log_weights_T) == 1:
        return log_weights_T
    largest = log_weights_T.max()
    weights_T = np.exp(log_weights_T - largest)
    others_T = (weights_T.sum() - weights_T) / (len(weights_T) - 1)
    shared_T: NDArray[np.float64] = largest + np.log((1 - alpha) * weights_T + alpha * others_T)
    return shared_T
