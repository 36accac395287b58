"""Sampling by a bandit that expects an adversary. Shape suffix: T tasks."""

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


class Exp3(MovingMixture):
    """Samples the tasks more often that training on brings more: ``p = (1 - gamma) softmax(w) + gamma / T``.

    Every reward, rescaled to ``r_t`` in [0, 1] by the 20 % and 80 % quantiles of all rewards so far, adds
    ``(gamma / T) r_t (n_t / B) / p_t`` to the task's log-weight ``w_t``, where n_t of the B examples are the task's.
    That is the importance-weighted estimate, which does not favour the tasks that are sampled much. An absent task's
    log-weight stays as it is. All tasks start alike.

    Source: Auer et al., "The Nonstochastic Multiarmed Bandit Problem", SIAM J. Computing 32 (2002), Fig. 1. Deviations:
    a step draws B arms at once; the quantiles take the place of a known range of the rewards (after Graves et al., ICML
    2017); the floor can be set apart from gamma.

    Args:
        sizes: Training examples of each task [T]; only their number matters.
        reward: ``"loss_decrease"``: relative fall of the loss of a step's examples by that step, which costs a forward
            more per step; ``"gap_closed"``: relative fall of the validation loss from one evaluation to the next. Both
            per example: a task is not worth more because more of it was drawn.
        gamma: In (0, 1]: step size, and the share that is spread evenly. ``None`` for the paper's Corollary 3.2,
            ``min(1, sqrt(T ln T / ((e - 1) num_steps)))``.
        floor: Share of the examples, in [0, 1], that is spread evenly over all tasks; ``None`` for gamma.
        warmup: Steps that are drawn evenly before the probabilities move.
        smoothing: Weight of the old probabilities in every move, in [0, 1).
        reservoir_size: Rewards kept for the quantiles, at least 1.
        num_steps: Optimizer steps of the stage; needed where gamma is not given.
        seed: Of the generator of the sample of rewards; also orders ties between equal tasks.

    Raises:
        ValueError: If an argument is outside its range, or neither gamma nor the number of steps is given.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        reward: Literal["loss_decrease", "gap_closed"] = "loss_decrease",
        gamma: float | None = None,
        floor: float | None = None,
        warmup: int = 0,
        smoothing: float = 0.0,
        reservoir_size: int = 1000,
        num_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        num_tasks = len(checked_sizes(sizes))
        if gamma is None:
            if num_steps is None or num_steps < 1:
                raise ValueError(f"gamma: must be given where num_steps is not, found num_steps={num_steps}; try 0.1")
            gamma = min(1.0, math.sqrt(num_tasks * math.log(num_tasks) / ((math.e - 1) * num_steps)))
        elif not 0 < gamma <= 1:
            raise ValueError(f"gamma: must be above 0 and at most 1, found {gamma}; null suits the number of steps")
        self._rewards = reward_source(reward, num_tasks)
        self.needs = self._rewards.needs
        self._scale = RunningScale(reservoir_size, seed)
        self._gamma = gamma
        self._log_weights_T = np.zeros(num_tasks)
        super().__init__(
            np.ones(num_tasks),
            floor=gamma if floor is None else floor,
            warmup=warmup,
            smoothing=smoothing,
            seed=seed,
        )

    def _shares(self, feedback: TaskFeedback) -> NDArray[np.float64] | None:
        reward = self._rewards.collect(feedback, self.probabilities)
        if reward is None:
            return None
        rewards_M = self._scale(reward.gains_M)
        step = self._gamma / len(self._log_weights_T)
        self._log_weights_T[list(reward.tasks)] += step * rewards_M * reward.importance_M
        self._note("reward", dict(zip(reward.tasks, rewards_M.tolist(), strict=True)))
        return softmax(self._log_weights_T)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "log_weights": self._log_weights_T.tolist(),
            "scale": self._scale.state_dict(),
            "rewards": self._rewards.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._log_weights_T = np.array(state["log_weights"])
        self._scale.load_state_dict(state["scale"])
        self._rewards.load_state_dict(state["rewards"])
