"""What a run is told, checked before anything is loaded; plain dataclasses, no config library."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtl.construct import Maker, build
from mtl.errors import UserError
from mtl.evaluation.metrics import check_metric
from mtl.interfaces import AdapterLayout, GradientSurgery, LossWeighter, TaskSampler
from mtl.models.load import ModelSettings, default_cache_dir
from mtl.stages import Stage
from mtl.surgery import GramianSurgery
from mtl.tasks import Task, check_task_names

CHOICES = {
    "share": ("sampled", "equal", "tokens"),
    "too_long": ("error", "drop"),
    "mixed_precision": ("auto", "no", "bf16", "fp16"),
    "non_finite": ("stop", "skip"),
    "surgery_granularity": ("global", "layer", "module"),
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
    "keep_last",
)
NEEDS_PROVIDED = frozenset({"losses", "losses_after", "gramian", "validation", "scores"})


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
        for key in ("seed", "keep_best", "max_skipped_steps"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)}: must not be negative.")


@dataclass(frozen=True)
class StageShape:
    """What strategies may know of their stage: its tasks' names and training examples, its steps, their examples."""

    names: Sequence[str]
    sizes: Sequence[int]
    num_steps: int
    batch_size: int


@dataclass(frozen=True)
class Factories:
    """Makes the parts of a run from what only the run knows.

    ``scheduler`` takes the optimizer, the warm-up steps and all steps, ``layout`` the model and the tasks' names.
    """

    layout: Callable[[nn.Module, Sequence[str]], AdapterLayout]
    sampler: Callable[[StageShape], TaskSampler]
    weighter: Callable[[StageShape], LossWeighter]
    surgery: Callable[[StageShape], GradientSurgery]
    optimizer: Callable[[list[nn.Parameter], float], Optimizer]
    scheduler: Callable[[Optimizer, int, int], LRScheduler]


@dataclass(frozen=True)
class Settings:
    """A whole run.

    Args:
        options: The plain values.
        model: Which model.
        tasks: What to learn.
        stages: In which order.
        factories: By what means.
        output_dir: Where everything goes.
        cache_dir: Where what other runs can use goes.
        resume_from_checkpoint: A run folder, a checkpoint, or ``auto``.
        config: The resolved config as plain data, to be saved and shown.
        strategy: The levers' short names, such as ``{"sampler": "Temperature"}``.
    """

    options: Options
    model: ModelSettings
    tasks: Sequence[Task]
    stages: Sequence[Stage]
    factories: Factories
    output_dir: Path
    cache_dir: Path
    resume_from_checkpoint: str | None
    config: Mapping[str, Any]
    strategy: Mapping[str, str]

    def check(self) -> None:
        """Refuses what can be known to fail, or to do nothing, before data and model are loaded.

        Raises:
            UserError: Names the option, the rule and the remedy.
        """
        if not self.tasks:
            raise UserError("tasks: there is none. Take tasks=[sentiment,g2p] or give your own: tasks.mine.path=...")
        names = [task.name for task in self.tasks]
        for task in self.tasks:
            try:
                if task.metric != "auto":
                    check_metric(task.metric)
            except UserError as error:
                raise UserError(f"tasks.{task.name}.metric: {error}") from error
        for stage in self.stages:
            stage.check_tasks(names)
        shape = self.shape_of_all_tasks()
        sampler = self.factories.sampler(shape)
        assert len(sampler.probabilities) == len(names)
        for group, part in (("sampler", sampler), ("weighter", self.factories.weighter(shape))):
            needs: frozenset[str] = getattr(part, "needs", frozenset())
            if not needs <= NEEDS_PROVIDED:
                raise UserError(
                    f"{group}={self.strategy[group]}: needs {sorted(needs - NEEDS_PROVIDED)}, which the loop does not "
                    f"compute. Take another {group}."
                )
            if "scores" in needs and not self.options.eval_scores:
                raise UserError(
                    f"{group}={self.strategy[group]} goes by validation scores, and eval_scores=false computes none. "
                    f"Set eval_scores=true, or take a {group} that goes by losses."
                )
        optimizer = self.factories.optimizer([nn.Parameter(torch.zeros(1))], 1e-3)
        self.factories.scheduler(optimizer, 0, 1)
        surgery = self.factories.surgery(shape)
        if self.options.surgery_every > 1:
            self._check_every(surgery)
        effect = surgery.weights_act
        if effect in ("no", "reversed") and self.strategy["weighter"] != "Equal" and not self.options.allow_ineffective:
            raise UserError(
                f"surgery={self.strategy['surgery']} with weighter={self.strategy['weighter']}: loss weights act "
                f"through it: {effect}. Take weighter=equal, another surgery, or allow_ineffective=true."
            )

    def shape_of_all_tasks(self) -> StageShape:
        """A stage of one step on all tasks, to make strategies with before the data are read."""
        names = [task.name for task in self.tasks]
        return StageShape(names, [1] * len(names), 1, self.options.batch_size)

    def _check_every(self, surgery: GradientSurgery) -> None:
        every = f"surgery_every={self.options.surgery_every}"
        if not isinstance(surgery, GramianSurgery):
            raise UserError(
                f"{every}: surgery={self.strategy['surgery']} has no coefficients that could be kept. Set "
                "surgery_every=1 or take another surgery."
            )
        if self.options.surgery_granularity != "global":
            raise UserError(
                f"{every}: keeps one coefficient a task, and each group of "
                f"surgery_granularity={self.options.surgery_granularity} has its own. Set one of them back."
            )


def micro_batch_tokens(*, use_cpu: bool) -> int:
    """What suits the device: a CPU is no faster with more, and takes more memory; a GPU wants to be filled."""
    return 2048 if torch.cuda.is_available() and not use_cpu else 384


def settings_from(config: dict[str, Any], makers: Mapping[str, Maker], folder: Path) -> Settings:
    """Turns a config into settings and checks them.

    Args:
        config: The resolved config as plain data.
        makers: Of adapters, sampler, weighter, surgery, optimizer and scheduler.
        folder: Output folder where the config names none.

    Raises:
        UserError: A key is unknown to what it is meant for, or a value breaks a rule.
    """
    output_dir = Path(config["output_dir"]).expanduser() if config["output_dir"] else folder
    cache_dir = Path(config["cache_dir"]).expanduser() if config["cache_dir"] else default_cache_dir()
    values = {key: config[key] for key in inspect.signature(Options).parameters}
    if values["micro_batch_tokens"] is None:
        values["micro_batch_tokens"] = micro_batch_tokens(use_cpu=values["use_cpu"])
    options = Options(**values)
    tasks = [build(Task, f"tasks.{name}", values, name=name) for name, values in (config["tasks"] or {}).items()]
    check_task_names([task.name for task in tasks])
    known_stages, order = config["stages"] or {}, config["stage_order"]
    if not order:
        raise UserError("stage_order: is empty. Name at least one of the stages.")
    for name in order:
        if name not in known_stages:
            raise UserError(f"stage_order: {name} is not in stages, which has {', '.join(known_stages)}. Correct one.")
    stages = [build(Stage, f"stages.{name}", known_stages[name], name=name) for name in order]
    if config["only_task"] is not None:
        tasks, stages = alone(config["only_task"], config["only_budget"], tasks, stages)
    seed = options.seed
    factories = Factories(
        layout=lambda model, names: makers["adapters"](model=model, num_tasks=len(names), names=names, seed=seed),
        sampler=lambda shape: makers["sampler"](**vars(shape), seed=seed),
        weighter=lambda shape: makers["weighter"](**vars(shape), num_tasks=len(shape.names), seed=seed),
        surgery=lambda shape: makers["surgery"](names=shape.names, seed=seed),
        optimizer=lambda params, lr: makers["optimizer"](params=params, lr=lr),
        scheduler=lambda optimizer, warmup, total: makers["scheduler"](
            optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=total
        ),
    )
    strategy = {group: makers[group].name for group in ("sampler", "weighter", "surgery", "adapters")}
    settings = Settings(
        options=options,
        model=build(ModelSettings, "model", config["model"]),
        tasks=tasks,
        stages=stages,
        factories=factories,
        output_dir=output_dir,
        cache_dir=cache_dir,
        resume_from_checkpoint=config["resume_from_checkpoint"],
        # The run's folder tells its config; it was not resumed, nor part of a sweep, by whoever repeats it.
        config={**config, "output_dir": str(output_dir), "resume_from_checkpoint": None, "sweep": {}},
        strategy={**strategy, "stages": "+".join(order)},
    )
    settings.check()
    return settings


def alone(name: str, budget: str, tasks: Sequence[Task], stages: Sequence[Stage]) -> tuple[list[Task], list[Stage]]:
    """The task by itself, and the stages as long as ``budget`` says.

    With ``"examples"`` it sees as many examples as its equal part of a run on all tasks, so a number of steps is
    divided by that of the tasks (and a number of epochs, which are the task's own by then, stays); with ``"steps"`` as
    many steps, all of whose examples are its own.

    Raises:
        UserError: There is no such task or budget.
    """
    if budget not in ("examples", "steps"):
        raise UserError(f"only_budget={budget}: must be examples or steps.")
    own = [task for task in tasks if task.name == name]
    if not own:
        raise UserError(f"only_task={name}: must be one of the tasks, {', '.join(task.name for task in tasks)}.")
    if budget == "steps":
        return own, list(stages)
    return own, [
        stage if stage.max_steps is None else replace(stage, max_steps=math.ceil(stage.max_steps / len(tasks)))
        for stage in stages
    ]
