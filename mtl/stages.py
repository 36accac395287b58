"""Stages: which tasks are trained, how and for how long, one stage after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtl.errors import UserError
from mtl.weak import WEAKNESSES

CHOICES = {
    "weakness": tuple(WEAKNESSES),
    "trainable": ("all", "shared", "private"),
    "optimizer": ("fresh", "carry"),
    "guard": ("none", "rollback", "interpolate"),
}
POSITIVE = ("num_weakest", "num_epochs", "max_steps", "batch_size", "learning_rate", "max_train_examples")
NOT_NEGATIVE = ("l2_to_start", "kl_to_start", "allowed_drop")


@dataclass(frozen=True)
class Stage:
    """One stage, as its config says it; every field is a key of ``stages.<name>``.

    Args:
        name: The stage's key in the config.
        tasks: ``"all"``, a list of task names, or ``"weakest"``: chosen when the stage begins, by validation data.
        weakness: What a weak task is, see :data:`mtl.weak.WEAKNESSES`.
        num_weakest: At most so many tasks are chosen; ``None``: all that are weak.
        min_weakness: How weak a task must be to be chosen, in terms of ``weakness``; ``None``: above 0 for gaps,
            anything for the others.
        targets: Scores that tasks ought to reach, by name; for ``weakness="target"``.
        trainable: Which parameters move: ``"all"``, ``"shared"``, or ``"private"``: only the tasks' own.
        num_epochs: Length in epochs; an epoch is as many examples as the stage's training sets have together.
        max_steps: Length in optimizer steps instead.
        batch_size: Examples of a step over all ranks and micro-batches; the run's if not given.
        learning_rate: Peak learning rate; the run's if not given.
        max_train_examples: Of each task, only so many training examples, a seeded choice.
        sampler: Another sampler than the run's, as the config of one; so are ``weighter`` and ``surgery``.
        weighter: See ``sampler``.
        surgery: See ``sampler``.
        optimizer: ``"fresh"``, or ``"carry"``: begins with the moments that the stage before ended with.
        replay: Share of the examples that come from the run's other tasks, so that they are not forgotten.
        l2_to_start: Pulls the parameters towards those at the stage's beginning, by this times the learning rate at
            every step, decoupled from the gradient like AdamW's weight decay (L2-SP: Li et al., ICML 2018).
        kl_to_start: Adds this times KL(model at the stage's beginning || model) at the target tokens to every task's
            loss (Li and Hoiem, ECCV 2016), at the price of a further forward.
        guard: What to do if another task is harmed: ``"rollback"`` to the stage's beginning, or ``"interpolate"``
            between the two as far as none is; see :mod:`mtl.guard`.
        allowed_drop: By how much another task may fall [points of its score in 0 to 1; where there is only a loss, its
            relative rise].
        guard_confidence: How sure a fall must be to count; ``None``: any beyond ``allowed_drop`` does.
    """

    name: str
    tasks: str | Sequence[str] = "all"
    weakness: str = "loss_ratio"
    num_weakest: int | None = 2
    min_weakness: float | None = None
    targets: Mapping[str, float] = field(default_factory=dict)
    trainable: str = "all"
    num_epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    max_train_examples: int | None = None
    sampler: Mapping[str, Any] | None = None
    weighter: Mapping[str, Any] | None = None
    surgery: Mapping[str, Any] | None = None
    optimizer: str = "fresh"
    replay: float = 0.0
    l2_to_start: float = 0.0
    kl_to_start: float = 0.0
    guard: str = "none"
    allowed_drop: float = 0.02
    guard_confidence: float | None = 0.95

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            if self.tasks not in ("all", "weakest"):
                self.refuse("tasks", "must be all, weakest or a list of names")
        elif not isinstance(self.tasks, Sequence) or not self.tasks:
            self.refuse("tasks", "must be all, weakest or a list of at least one name")
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                self.refuse(key, f"must be one of {', '.join(choices)}")
        for key in POSITIVE:
            value = getattr(self, key)
            if value is not None and not (is_number(value) and value > 0):
                self.refuse(key, "must be a positive number")
        for key in NOT_NEGATIVE:
            if not (is_number(getattr(self, key)) and getattr(self, key) >= 0):
                self.refuse(key, "must be a number of at least 0")
        if not (is_number(self.replay) and 0 <= self.replay < 1):
            self.refuse("replay", "must be a share of the examples, at least 0 and below 1")
        confidence = self.guard_confidence
        if confidence is not None and not (is_number(confidence) and 0.5 <= confidence < 1):
            self.refuse("guard_confidence", "must be at least 0.5 and below 1, or null")
        if self.tasks == "all" and self.replay:
            self.refuse("replay", "needs other tasks than the stage's, and it has all. Set tasks or replay=0")
        if self.tasks == "all" and self.guard != "none":
            self.refuse("guard", "protects the tasks that a stage does not have, and it has all. Set guard=none")

    @property
    def keeps_start(self) -> bool:
        """Whether the stage goes by the parameters that it begins with."""
        return self.guard != "none" or self.l2_to_start > 0 or self.kl_to_start > 0

    def check_tasks(self, names: Sequence[str]) -> None:
        """Refuses task names that the run does not have, and more weak tasks than there are tasks."""
        if self.tasks == "weakest":
            if self.num_weakest is not None and self.num_weakest > len(names):
                self.refuse("num_weakest", f"must not exceed the number of the run's tasks, {len(names)}")
            if self.weakness == "target" and not self.targets:
                self.refuse("targets", "must give a score for weakness=target. Set targets.<task>=<score in 0 to 1>")
        for key, given in (("tasks", self.tasks), ("targets", list(self.targets))):
            unknown = [] if isinstance(given, str) else [name for name in given if name not in names]
            if unknown:
                raise UserError(
                    f"stages.{self.name}.{key}={unknown[0]}: must be among the run's tasks, {', '.join(names)}."
                )
        if set(names) <= set(self.tasks) and (self.replay or self.guard != "none"):
            self.refuse(
                "tasks", "are all of the run's, which leaves none to replay or to guard. Set replay=0 guard=none"
            )

    def num_steps(self, num_examples: int, batch_size: int) -> int:
        """Optimizer steps of the stage, for training sets of ``num_examples`` together."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.num_epochs * num_examples / batch_size))

    def refuse(self, key: str, rule: str) -> None:
        """Raises the ``UserError`` of a field that breaks a rule."""
        raise UserError(f"stages.{self.name}.{key}={getattr(self, key)}: {rule}.")


def is_number(value: object) -> bool:
    """Whether it is one, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def evaluation_steps(num_steps: int, *, evals_per_stage: int, eval_steps: int | None) -> frozenset[int]:
    """The steps of a stage (counted from 1) after which it evaluates; the last one is always among them."""
    if eval_steps is not None:
        return frozenset([*range(eval_steps, num_steps, eval_steps), num_steps])
    return frozenset(math.ceil(k * num_steps / evals_per_stage) for k in range(1, evals_per_stage + 1))
