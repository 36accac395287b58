"""Sampling by how weak the tasks still are. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import TaskFeedback
from mtl.samplers.draws import DeficitDraws, checked_sizes

# A base loss so near 0 that its ratio would be noise [nats per target token].
MIN_BASE_LOSS = 1e-3


class Performance:
    """Samples the tasks that are still weak more often: ``p_t = (1 - floor) r_t / sum r + floor / T``.

    ``signal="gap"``: ``r_t = max(target_t - score_t, 0) ** exponent``, with the newest validation score. A task without
    a score (its metric is none) counts with the mean of the known gaps: its loss has another unit. Until the first
    score, ``r_t = sqrt(n_t)``. Once no task has a gap left, all are equal.

    ``signal="loss_ratio"``: ``r_t = (mean L_t / L_t(0)) ** exponent``, with the bias-corrected exponential mean of the
    training losses. ``L_t(0)`` is the validation loss before training, or the first training loss where there was no
    such evaluation. A task not trained on yet has the ratio 1.

    Sources: gap, Gottumukkala et al., "Dynamic Sampling Strategies for Multi-Task Reading Comprehension", ACL 2020;
    ratio, the inverse training rate of Chen et al., "GradNorm", ICML 2018, sec. 3.2, here for sampling.

    Args:
        sizes: Training examples ``n_t`` of each task [T].
        names: Names of the T tasks; needed to read a mapping of targets.
        signal: ``"gap"`` or ``"loss_ratio"``.
        targets: Score to reach, in [0, 1]: one for all, or a mapping from task name (1, a perfect score, for tasks it
            does not name). Scores of models trained on one task alone make good targets.
        exponent: At least 0; 0 samples all tasks equally, larger values concentrate on the weakest.
        floor: Share of the examples, in [0, 1], that is spread evenly over all tasks.
        smoothing: Decay of the exponential mean of the losses, in [0, 1).
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If an argument is outside its range, or the targets name an unknown task.
    """

    probabilities: Sequence[float]

    def __init__(
        self,
        sizes: Sequence[int],
        names: Sequence[str] | None = None,
        signal: Literal["gap", "loss_ratio"] = "gap",
        targets: float | Mapping[str, float] = 1.0,
        exponent: float = 1.0,
        floor: float = 0.05,
        smoothing: float = 0.9,
        seed: int = 0,
    ) -> None:
        if signal not in ("gap", "loss_ratio"):
            raise ValueError(f'signal: must be "gap" or "loss_ratio", found {signal!r}; choose one of them')
        if not 0 <= exponent < np.inf:
            raise ValueError(f"exponent: must be at least 0 and finite, found {exponent}; 1 is proportional to the gap")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor: must be a share in [0, 1], found {floor}; 0.05 spreads 5 % evenly")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: must be in [0, 1), found {smoothing}; 0.9 averages about 10 steps")
        self._sizes_T = checked_sizes(sizes)
        num_tasks = len(self._sizes_T)
        self.needs = frozenset({"scores"}) if signal == "gap" else frozenset()
        self._signal = signal
        self._targets_T = _target_of_each_task(targets, names, num_tasks)
        self._exponent = exponent
        self._floor = floor
        self._smoothing = smoothing
        self._scores_T: list[float | None] = [None] * num_tasks
        self._base_losses_T: list[float | None] = [None] * num_tasks
        self._mean_losses_T = [0.0] * num_tasks
        self._num_losses_T = [0] * num_tasks
        self._draws = DeficitDraws(num_tasks, seed)
        self.probabilities = self._mixture()

    def counts(self, num_examples: int) -> list[int]:
        return self._draws.counts(self.probabilities, num_examples)

    def update(self, feedback: TaskFeedback) -> None:
        """Takes the losses of the present tasks and the validation results, if any, and moves the probabilities."""
        for task, loss in zip(feedback.tasks, feedback.losses_M.tolist(), strict=True):
            if self._base_losses_T[task] is None:
                self._base_losses_T[task] = loss
            self._mean_losses_T[task] += (1 - self._smoothing) * (loss - self._mean_losses_T[task])
            self._num_losses_T[task] += 1
        for task, result in (feedback.validation or {}).items():
            if "score" in result:
                self._scores_T[task] = result["score"]
            if not feedback.tasks and self._base_losses_T[task] is None:
                self._base_losses_T[task] = result["loss"]
        self.probabilities = self._mixture()

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": list(self._scores_T),
            "base_losses": list(self._base_losses_T),
            "mean_losses": list(self._mean_losses_T),
            "num_losses": list(self._num_losses_T),
            "draws": self._draws.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state["draws"])
        self._scores_T = list(state["scores"])
        self._base_losses_T = list(state["base_losses"])
        self._mean_losses_T = list(state["mean_losses"])
        self._num_losses_T = list(state["num_losses"])
        self.probabilities = self._mixture()

    def _mixture(self) -> Sequence[float]:
        raw_T = self._weakness_by_gap() if self._signal == "gap" else self._weakness_by_loss_ratio()
        total, num_tasks = raw_T.sum(), len(raw_T)
        shares_T = raw_T / total if total > 0 else np.full(num_tasks, 1 / num_tasks)
        return tuple(((1 - self._floor) * shares_T + self._floor / num_tasks).tolist())

    def _weakness_by_gap(self) -> NDArray[np.float64]:
        gaps_T = [
            None if score is None else max(target - score, 0.0)
            for target, score in zip(self._targets_T, self._scores_T, strict=True)
        ]
        known = [gap for gap in gaps_T if gap is not None]
        if not known:
            return np.sqrt(self._sizes_T)
        mean_gap = sum(known) / len(known)
        return np.array([mean_gap if gap is None else gap for gap in gaps_T]) ** self._exponent

    def _weakness_by_loss_ratio(self) -> NDArray[np.float64]:
        ratios_T = np.ones(len(self._sizes_T))
        for task, (base, mean, num) in enumerate(
            zip(self._base_losses_T, self._mean_losses_T, self._num_losses_T, strict=True)
        ):
            if base is not None and num > 0:
                ratios_T[task] = mean / (1 - self._smoothing**num) / max(base, MIN_BASE_LOSS)
        return ratios_T**self._exponent


def _target_of_each_task(
    targets: float | Mapping[str, float], names: Sequence[str] | None, num_tasks: int
) -> Sequence[float]:
    if isinstance(targets, Mapping):
        if names is None:
            raise ValueError("names: must be given to read targets by task name, found None; pass the tasks' names")
        known = list(names)
        unknown = [name for name in targets if name not in known]
        if unknown:
            raise ValueError(f"targets: must name tasks of the run, found {unknown[0]!r}; the tasks are {known}")
        target_T = [float(targets.get(name, 1.0)) for name in known]
    else:
        target_T = [float(targets)] * num_tasks
    for target in target_T:
        if not 0 <= target <= 1:
            raise ValueError(f"targets: must be scores in [0, 1], found {target}; divide percentages by 100")
    return target_T
