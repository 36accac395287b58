"""Stages: which tasks are trained, for how long, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mtl.errors import UserError


@dataclass(frozen=True)
class Stage:
    """One stage, as its config says it; every field is a key of ``stages.<name>``.

    Args:
        name: The stage's key in the config.
        tasks: ``"all"``, a list of task names, or ``"weakest"``: those whose validation loss has improved least over
            the base model, relative to it, when the stage begins.
        num_weakest: How many tasks ``"weakest"`` means.
        num_epochs: Length in epochs; an epoch is as many examples as the stage's training sets have together.
        max_steps: Length in optimizer steps instead.
        batch_size: Examples of a step over all ranks and micro-batches; the run's if not given.
        learning_rate: Peak learning rate; the run's if not given.
    """

    name: str
    tasks: str | Sequence[str] = "all"
    num_weakest: int = 2
    num_epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            if self.tasks not in ("all", "weakest"):
                self._refuse("tasks", self.tasks, "must be all, weakest or a list of names")
        elif not isinstance(self.tasks, Sequence) or not self.tasks:
            self._refuse("tasks", self.tasks, "must be all, weakest or a list of at least one name")
        for field in ("num_weakest", "num_epochs", "max_steps", "batch_size", "learning_rate"):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                self._refuse(field, value, "must be a positive number")

    def check_tasks(self, names: Sequence[str]) -> None:
        """Refuses task names that the run does not have, and more weak tasks than there are tasks."""
        if self.tasks == "weakest" and self.num_weakest > len(names):
            self._refuse(
                "num_weakest", self.num_weakest, f"must not exceed the number of the run's tasks, {len(names)}"
            )
        if not isinstance(self.tasks, str):
            unknown = [name for name in self.tasks if name not in names]
            if unknown:
                self._refuse("tasks", unknown[0], f"must be among the run's tasks, {', '.join(names)}")

    def select_tasks(self, names: Sequence[str], improvements_T: Sequence[float]) -> list[int]:
        """Indices of the stage's tasks, ascending.

        Args:
            names: Of the run's T tasks.
            improvements_T: ``1 - loss / base loss`` of each on validation data.
        """
        if self.tasks == "weakest":
            by_improvement = sorted(range(len(names)), key=lambda task: improvements_T[task])
            return sorted(by_improvement[: self.num_weakest])
        if isinstance(self.tasks, str):
            return list(range(len(names)))
        return sorted({names.index(name) for name in self.tasks})

    def num_steps(self, num_examples: int, batch_size: int) -> int:
        """Optimizer steps of the stage, for training sets of ``num_examples`` together."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.num_epochs * num_examples / batch_size))

    def _refuse(self, field: str, value: object, rule: str) -> None:
        raise UserError(f"stages.{self.name}.{field}={value}: {rule}.")


def evaluation_steps(num_steps: int, *, evals_per_stage: int, eval_steps: int | None) -> frozenset[int]:
    """The steps of a stage (counted from 1) after which it evaluates; the last one is always among them."""
    if eval_steps is not None:
        return frozenset([*range(eval_steps, num_steps, eval_steps), num_steps])
    return frozenset(math.ceil(k * num_steps / evals_per_stage) for k in range(1, evals_per_stage + 1))
