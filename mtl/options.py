"""The plain values of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtl.errors import UserError
from mtl.evaluation.objectives import OBJECTIVES

CHOICES = {
    "share": ("sampled", "equal", "tokens"),
    "too_long": ("error", "drop"),
    "mixed_precision": ("auto", "no", "bf16", "fp16"),
    "non_finite": ("stop", "skip"),
    "surgery_granularity": ("global", "layer", "module"),
    "select_by": OBJECTIVES,
    "when_converged": ("freeze", "floor"),
}
POSITIVE = (
    "num_epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "max_grad_norm",
    "max_row_bytes",
    "surgery_every",
    "conflict_steps",
    "max_length",
    "micro_batch_tokens",
    "eval_micro_batch_tokens",
    "evals_per_stage",
    "eval_steps",
    "max_eval_examples",
    "max_test_examples",
    "early_stopping_patience",
    "task_patience",
    "keep_last",
)


@dataclass(frozen=True)
class Options:
    """The plain values of a run; each is a key of ``conf/train.yaml``, which documents it.

    Raises:
        UserError: A value is out of its range.
    """

    seed: int
    num_epochs: float
    max_steps: int | None
    batch_size: int
    learning_rate: float | None
    warmup_ratio: float
    max_grad_norm: float | None
    share: str
    allow_ineffective: bool
    surgery_granularity: str
    surgery_every: int
    max_row_bytes: float
    max_length: int
    too_long: str
    micro_batch_tokens: int
    eval_micro_batch_tokens: int
    packing: bool
    mixed_precision: str
    use_cpu: bool
    evals_per_stage: int
    eval_steps: int | None
    eval_scores: bool
    max_eval_examples: int | None
    max_test_examples: int | None
    early_stopping_patience: int | None
    non_finite: str
    max_skipped_steps: int
    keep_last: int
    keep_best: int
    allow_config_change: bool
    deterministic: bool
    conflict_steps: int | None
    select_by: str
    task_patience: int | None
    when_converged: str
    converged_floor: float

    def __post_init__(self) -> None:
        for key in POSITIVE:
            value = getattr(self, key)
            if value is not None and not value > 0:  # nan, too
                raise UserError(f"{key}={value}: must be above 0. Correct the value.")
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"{key}={getattr(self, key)}: must be one of {', '.join(choices)}.")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"warmup_ratio={self.warmup_ratio}: must be a share of the steps, at least 0 and below 1.")
        if not 0 < self.converged_floor <= 1:
            raise UserError(
                f"converged_floor={self.converged_floor}: must be a share of a task's probability, above 0, at most 1."
            )
        for key in ("seed", "keep_best", "max_skipped_steps"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)}: must not be negative.")


def micro_batch_tokens(*, use_cpu: bool) -> int:
    """What suits the device: a CPU is no faster with more, and takes more memory; a GPU wants to be filled."""
    return 2048 if torch.cuda.is_available() and not use_cpu else 384
