"""Sampling of some tasks with a part of the others in between. Shape suffix: T tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mtl.interfaces import TaskFeedback, TaskSampler
from mtl.samplers.draws import DeficitDraws


class Replay:
    """Gives ``share`` of the examples to the tasks that are to be remembered, all alike, and the rest to ``inner``.

    ``inner`` samples the tasks in ``focus`` and hears of no other, so that what it goes by is theirs alone.

    Source: experience replay as in Scialom et al., "Fine-tuned Language Models are Continual Learners", EMNLP 2022,
    with a share of the step in the place of one of the data.

    Args:
        inner: Sampler of the tasks in ``focus``, in their order.
        focus: Their indices, ascending.
        num_tasks: T, at least one more than ``focus`` has.
        share: Of the examples, at least 0 and below 1.
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: There is no other task, or the share is out of its range.
    """

    def __init__(self, inner: TaskSampler, focus: Sequence[int], num_tasks: int, share: float, seed: int = 0) -> None:
        if not 0 <= share < 1:
            raise ValueError(f"share: must be at least 0 and below 1, found {share}; it is a part of the examples")
        self._others = [task for task in range(num_tasks) if task not in focus]
        if not self._others:
            raise ValueError(f"focus: must leave a task to replay, found all {num_tasks}; leave one out")
        self.inner = inner
        self.needs: frozenset[str] = getattr(inner, "needs", frozenset())
        self._focus = list(focus)
        self._num_tasks = num_tasks
        self._share = share
        self._sides = DeficitDraws(2, seed)
        self._draws = DeficitDraws(len(self._others), seed)

    @property
    def probabilities(self) -> Sequence[float]:
        """Of all T tasks."""
        own = [(1 - self._share) * p for p in self.inner.probabilities]
        return self._spread(own, [self._share / len(self._others)] * len(self._others), 0.0)

    @property
    def signals(self) -> Mapping[str, Sequence[float | None]]:
        """Those of ``inner``, ``None`` for the others."""
        nothing: list[float | None] = [None] * len(self._others)
        signals: Mapping[str, Sequence[float | None]] = getattr(self.inner, "signals", {})
        return {key: self._spread(list(values), nothing, None) for key, values in signals.items()}

    def counts(self, num_examples: int) -> list[int]:
        num_own, num_others = self._sides.counts([1 - self._share, self._share], num_examples)
        uniform = [1 / len(self._others)] * len(self._others)
        return self._spread(list(self.inner.counts(num_own)), self._draws.counts(uniform, num_others), 0)

    def update(self, feedback: TaskFeedback) -> None:
        self.inner.update(restricted(feedback, self._focus))

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self.inner.state_dict(),
            "sides": self._sides.state_dict(),
            "draws": self._draws.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.inner.load_state_dict(state["inner"])
        self._sides.load_state_dict(state["sides"])
        self._draws.load_state_dict(state["draws"])

    def _spread(self, own: Sequence[Any], others: Sequence[Any], fill: Any) -> list[Any]:  # noqa: ANN401
        values = [fill] * self._num_tasks
        for places, items in ((self._focus, own), (self._others, others)):
            for task, item in zip(places, items, strict=True):
                values[task] = item
        return values


def restricted(feedback: TaskFeedback, kept: Sequence[int]) -> TaskFeedback:
    """The feedback of some tasks alone, numbered in the order of ``kept``."""
    number = {task: index for index, task in enumerate(kept)}
    places = [place for place, task in enumerate(feedback.tasks) if task in number]
    after, gramian, num_targets = feedback.losses_after_M, feedback.gramian_MM, feedback.num_targets_M
    return replace(
        feedback,
        tasks=[number[feedback.tasks[place]] for place in places],
        counts_M=[feedback.counts_M[place] for place in places],
        losses_M=feedback.losses_M[places],
        losses_after_M=None if after is None else after[places],
        gramian_MM=None if gramian is None else gramian[places][:, places],
        validation=None
        if feedback.validation is None
        else {number[task]: item for task, item in feedback.validation.items() if task in number},
        num_targets_M=None if num_targets is None else [num_targets[place] for place in places],
    )
