"""Which tasks are weak, by validation data alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mtl.evaluation.statistics import relative_change


@dataclass(frozen=True)
class Standing:
    """Where a task stands on validation data; scores are in [0, 1], ``None`` where there is none.

    Args:
        loss: Newest validation loss.
        base_loss: That before training.
        score: Newest score.
        best_score: The best one of the run so far.
        reference: Score of the task trained alone.
        target: Score that it ought to reach.
    """

    loss: float
    base_loss: float
    score: float | None = None
    best_score: float | None = None
    reference: float | None = None
    target: float | None = None


def by_loss_ratio(task: Standing) -> float | None:
    """Loss / loss before training: the least improved ones."""
    return task.loss / task.base_loss


def by_score(task: Standing) -> float | None:
    """1 - score: the lowest ones."""
    return None if task.score is None else 1 - task.score


def by_reference(task: Standing) -> float | None:
    """How far the score is below that of the task trained alone, relative to it."""
    if task.score is None or task.reference is None:
        return None
    return -float(relative_change(task.score, task.reference))


def by_target(task: Standing) -> float | None:
    """How far the score is below its target."""
    return None if task.score is None or task.target is None else task.target - task.score


def by_best(task: Standing) -> float | None:
    """How far the score is below the run's best one: what was forgotten again."""
    return None if task.score is None or task.best_score is None else task.best_score - task.score


WEAKNESSES: Mapping[str, Callable[[Standing], float | None]] = {
    "loss_ratio": by_loss_ratio,
    "score": by_score,
    "reference": by_reference,
    "target": by_target,
    "best": by_best,
}
GAPS = ("reference", "target", "best")
NEED_SCORES = ("score", *GAPS)


def weaknesses(rule: str, standings_T: Sequence[Standing]) -> list[float | None]:
    """How weak each task is, higher is weaker; ``None`` where it can't be said."""
    return [WEAKNESSES[rule](standing) for standing in standings_T]


def weakest(
    rule: str, weaknesses_T: Sequence[float | None], *, num_weakest: int | None, min_weakness: float | None
) -> list[int]:
    """Indices of the weak tasks, ascending; of equals the first ones. A gap must be above its minimum, 0 by default.

    Args:
        rule: One of ``WEAKNESSES``.
        weaknesses_T: What it says of each task.
        num_weakest: At most so many.
        min_weakness: What a task must exceed.
    """
    limit = 0.0 if min_weakness is None and rule in GAPS else min_weakness
    weak = [(-value, task) for task, value in enumerate(weaknesses_T) if value is not None]
    chosen = [task for value, task in sorted(weak) if limit is None or -value > limit]
    return sorted(chosen[:num_weakest])
