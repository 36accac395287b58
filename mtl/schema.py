"""Which keys a config may have at the top, and of which types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

SUPPLIED = {  # by group: the constructor arguments that are the run's to give
    "adapters": ("model", "num_tasks", "names", "seed"),
    "sampler": ("sizes", "names", "num_steps", "batch_size", "seed"),
    "weighter": ("num_tasks", "sizes", "names", "num_steps", "batch_size", "seed"),
    "surgery": ("names", "seed"),
    "optimizer": ("params", "lr"),
    "scheduler": ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"),
}


@dataclass
class RunConfig:
    """The keys that a config may have at the top, and their types; a misspelled key fails."""

    seed: int = MISSING
    output_dir: str | None = MISSING
    cache_dir: str | None = MISSING
    resume_from: str | None = MISSING
    resume_from_checkpoint: str | None = MISSING
    reference: str | None = MISSING
    merged_from: list[str] = MISSING
    num_epochs: float = MISSING
    max_steps: int | None = MISSING
    batch_size: int = MISSING
    learning_rate: float | None = MISSING
    warmup_ratio: float = MISSING
    max_grad_norm: float | None = MISSING
    share: str = MISSING
    allow_ineffective: bool = MISSING
    surgery_granularity: str = MISSING
    surgery_every: int = MISSING
    max_row_bytes: float = MISSING
    max_length: int = MISSING
    too_long: str = MISSING
    micro_batch_tokens: int | None = MISSING
    eval_micro_batch_tokens: int = MISSING
    packing: bool = MISSING
    mixed_precision: str = MISSING
    use_cpu: bool = MISSING
    evals_per_stage: int = MISSING
    eval_steps: int | None = MISSING
    eval_scores: bool = MISSING
    max_eval_examples: int | None = MISSING
    max_test_examples: int | None = MISSING
    early_stopping_patience: int | None = MISSING
    non_finite: str = MISSING
    max_skipped_steps: int = MISSING
    keep_last: int = MISSING
    keep_best: int = MISSING
    allow_config_change: bool = MISSING
    deterministic: bool = MISSING
    conflict_steps: int | None = MISSING
    select_by: str = MISSING
    task_patience: int | None = MISSING
    when_converged: str = MISSING
    converged_floor: float = MISSING
    only_task: str | None = MISSING
    only_budget: str = MISSING
    model: Any = None
    tasks: Any = None
    adapters: Any = None
    sampler: Any = None
    weighter: Any = None
    surgery: Any = None
    optimizer: Any = None
    scheduler: Any = None
    launch: Any = None
    sweep: Any = None
    stage_order: list[str] = MISSING
    stages: Any = None


def schema() -> DictConfig:
    """The types of the top, over groups that are open.

    Open, so that ``tasks.mine.path=...`` needs no plus sign; what groups hold is checked against the arguments of the
    class it is meant for, which can say what there is.
    """
    config = OmegaConf.structured(RunConfig)
    for group in ("tasks", "stages", "model", "launch", "sweep", *SUPPLIED):
        config[group] = DictConfig({}, flags={"struct": False})
    assert isinstance(config, DictConfig)
    return config
