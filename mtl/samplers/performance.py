"""Sampling by how weak the tasks still are. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtl.interfaces import TaskFeedback
from mtl.samplers.draws import checked_sizes
from mtl.samplers.moving import MIN_LOSS, MovingMixture, filled, validation_losses
from mtl.samplers.values import value_of_each_task


class Performance(MovingMixture):
    """Samples the tasks that are still weak more often: ``p_t = (1 - floor) r_t / sum r + floor / T``.

    ``signal="gap"``: ``r_t = max(target_t - score_t, 0) ** exponent``, with the newest validation score. A task without
    a score (its metric is none) counts with the mean of the known gaps: its loss has another unit. Until the first
    score, ``r_t = sqrt(n_t)``. Once no task has a gap left, all are equal.

    ``signal="loss_ratio"``: ``r_t = (mean L_t / L_t(0)) ** exponent``, with the bias-corrected exponential mean of the
    training losses. ``L_t(0)`` is the validation loss before training, or the first training loss where there was no
    such evaluation. A task not trained on yet has the ratio 1.

    ``signal="progress"``: ``r_t = |slope_t| ** exponent``, with the least-squares slope per step of the validation
    score over the newest ``window`` evaluations or, unless all tasks have scores, of the validation loss over
    ``L_t(0)``. A task that is being forgotten has a slope as well as one that is being learned. Until two evaluations,
    ``r_t = sqrt(n_t)``; once no task moves, all are equal.

    Sources: gap, Gottumukkala et al., "Dynamic Sampling Strategies for Multi-Task Reading Comprehension", ACL 2020;
    ratio, the inverse training rate of Chen et al., "GradNorm", ICML 2018, sec. 3.2, here for sampling; progress, the
    window algorithm of Matiisen et al., "Teacher-Student Curriculum Learning", IEEE TNNLS 2020, with probabilities in
    proportion to the slopes in place of its Boltzmann or epsilon-greedy choice.

    Args:
        sizes: Training examples ``n_t`` of each task [T].
        names: Names of the T tasks; needed to read a mapping of targets.
        signal: ``"gap"``, ``"loss_ratio"`` or ``"progress"``.
        targets: Score to reach, in [0, 1]: one for all, or a mapping from task name (1, a perfect score, for tasks it
            does not name). Scores of models trained on one task alone make good targets.
        exponent: At least 0; 0 samples all tasks equally, larger values concentrate on the weakest.
        floor: Share of the examples, in [0, 1], that is spread evenly over all tasks.
        smoothing: Decay of the exponential mean of the losses, in [0, 1).
        window: Evaluations that progress is measured over, at least 2.
        warmup: Steps that are drawn with the probabilities of the start.
        probability_smoothing: Weight of the old probabilities whenever they move, in [0, 1).
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If an argument is outside its range, or the targets name an unknown task.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        names: Sequence[str] | None = None,
        signal: Literal["gap", "loss_ratio", "progress"] = "gap",
        targets: float | Mapping[str, float] = 1.0,
        exponent: float = 1.0,
        floor: float = 0.05,
        smoothing: float = 0.9,
        window: int = 5,
        warmup: int = 0,
        probability_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        measures = {"gap": self._gaps, "loss_ratio": self._loss_ratios, "progress": self._slopes}
        if signal not in measures:
            raise ValueError(f'signal: must be "gap", "loss_ratio" or "progress", found {signal!r}; choose one of them')
        if not 0 <= exponent < np.inf:
            raise ValueError(f"exponent: must be at least 0 and finite, found {exponent}; 1 is proportional to the gap")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: must be in [0, 1), found {smoothing}; 0.9 averages about 10 steps")
        if window < 2:
            raise ValueError(f"window: must be at least 2 evaluations, found {window}; a slope needs two points")
        if not 0 <= probability_smoothing < 1:
            raise ValueError(
                f"probability_smoothing: must be in [0, 1), found {probability_smoothing}; 0 moves at once"
            )
        sizes_T = checked_sizes(sizes)
        num_tasks = len(sizes_T)
        self.needs = {"gap": frozenset({"scores"}), "progress": frozenset({"validation"})}.get(signal, frozenset())
        self._signal = signal
        self._measure = measures[signal]
        self._targets_T = _target_of_each_task(targets, names, num_tasks)
        self._exponent = exponent
        self._loss_decay = smoothing
        self._window = window
        self._scores_T: list[float | None] = [None] * num_tasks
        self._base_losses_T: list[float | None] = [None] * num_tasks
        self._mean_losses_T = [0.0] * num_tasks
        self._num_losses_T = [0] * num_tasks
        self._history: list[list[Any]] = []  # of evaluations: step, scores [T], losses [T]
        start_T = np.ones(num_tasks) if signal == "loss_ratio" else np.sqrt(sizes_T)
        super().__init__(start_T, floor=floor, warmup=warmup, smoothing=probability_smoothing, seed=seed)

    def _shares(self, feedback: TaskFeedback) -> NDArray[np.float64] | None:
        self._take_losses(feedback)
        self._take_validation(feedback)
        values_T = self._measure(feedback)
        if values_T is None:
            return None
        self.signals = {self._signal: values_T}
        weakness_T = filled(values_T) ** self._exponent
        total = weakness_T.sum()
        return weakness_T / total if total > 0 else np.full(len(weakness_T), 1 / len(weakness_T))

    def _take_losses(self, feedback: TaskFeedback) -> None:
        for task, loss in zip(feedback.tasks, feedback.losses_M.tolist(), strict=True):
            if self._base_losses_T[task] is None:
                self._base_losses_T[task] = loss
            self._mean_losses_T[task] += (1 - self._loss_decay) * (loss - self._mean_losses_T[task])
            self._num_losses_T[task] += 1

    def _take_validation(self, feedback: TaskFeedback) -> None:
        if not feedback.validation:
            return
        losses = validation_losses(feedback)
        scores = {task: result["score"] for task, result in feedback.validation.items() if "score" in result}
        for task, score in scores.items():
            self._scores_T[task] = score
        for task, loss in losses.items():
            if not feedback.tasks and self._base_losses_T[task] is None:
                self._base_losses_T[task] = loss
        if self._history and self._history[-1][0] == feedback.step:  # told twice, when a stage begins
            self._history.pop()
        tasks = range(len(self._scores_T))
        self._history.append(
            [feedback.step, [scores.get(task) for task in tasks], [losses.get(task) for task in tasks]]
        )
        self._history = self._history[-self._window :]

    def _gaps(self, feedback: TaskFeedback) -> list[float | None] | None:
        if not feedback.validation or all(score is None for score in self._scores_T):
            return None
        return [
            None if score is None else max(target - score, 0.0)
            for target, score in zip(self._targets_T, self._scores_T, strict=True)
        ]

    def _loss_ratios(self, feedback: TaskFeedback) -> list[float | None] | None:
        if not feedback.tasks:
            return None
        ratios_T: list[float | None] = [1.0] * len(self._base_losses_T)
        for task, (base, mean, num) in enumerate(
            zip(self._base_losses_T, self._mean_losses_T, self._num_losses_T, strict=True)
        ):
            if base is not None and num > 0:
                ratios_T[task] = mean / (1 - self._loss_decay**num) / max(base, MIN_LOSS)
        return ratios_T

    def _slopes(self, feedback: TaskFeedback) -> list[float | None] | None:
        if not feedback.validation:
            return None
        steps = [step for step, _, _ in self._history]
        slopes_T = [_slope(steps, values) for values in zip(*(scores for _, scores, _ in self._history), strict=True)]
        if None in slopes_T:
            losses = zip(*(losses for _, _, losses in self._history), strict=True)
            slopes_T = [_slope(steps, values, base) for values, base in zip(losses, self._base_losses_T, strict=True)]
        return None if all(slope is None for slope in slopes_T) else slopes_T

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "scores": list(self._scores_T),
            "base_losses": list(self._base_losses_T),
            "mean_losses": list(self._mean_losses_T),
            "num_losses": list(self._num_losses_T),
            "history": [[step, list(scores), list(losses)] for step, scores, losses in self._history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._scores_T = list(state["scores"])
        self._base_losses_T = list(state["base_losses"])
        self._mean_losses_T = list(state["mean_losses"])
        self._num_losses_T = list(state["num_losses"])
        self._history = [[step, list(scores), list(losses)] for step, scores, losses in state["history"]]


def _slope(steps: Sequence[int], values: Sequence[float | None], base: float | None = 1.0) -> float | None:
    """Size of the least-squares slope per step of ``values / base``; ``None`` with fewer than two points."""
    points = np.array([(step, value) for step, value in zip(steps, values, strict=True) if value is not None])
    if len(points) < 2 or base is None:
        return None
    away = points[:, 0] - points[:, 0].mean()
    return float(abs(away @ points[:, 1]) / (away @ away) / max(base, MIN_LOSS))


def _target_of_each_task(
    targets: float | Mapping[str, float], names: Sequence[str] | None, num_tasks: int
) -> Sequence[float]:
    if isinstance(targets, Mapping):
        target_T = value_of_each_task("targets", targets, names, num_tasks, default=1.0)
    else:
        target_T = [float(targets)] * num_tasks
    for target in target_T:
        if not 0 <= target <= 1:
            raise ValueError(f"targets: must be scores in [0, 1], found {target}; divide percentages by 100")
    return target_T
