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
from mtl.options import Options, micro_batch_tokens
from mtl.reporting.references import reference_scores
from mtl.stages import Stage
from mtl.surgery import GramianSurgery
from mtl.tasks import Task, check_task_names
from mtl.weak import NEED_SCORES

NEEDS_PROVIDED = frozenset({"losses", "losses_after", "gramian", "validation", "scores"})


@dataclass(frozen=True)
class StageShape:
    """What strategies may know of their stage: its tasks' names and training examples, its steps, their examples."""

    names: Sequence[str]
    sizes: Sequence[int]
    num_steps: int
    batch_size: int


@dataclass(frozen=True)
class Levers:
    """Makes the strategies of a stage; ``names`` are those of their classes, by lever."""

    sampler: Callable[[StageShape], TaskSampler]
    weighter: Callable[[StageShape], LossWeighter]
    surgery: Callable[[StageShape], GradientSurgery]
    names: Mapping[str, str]


@dataclass(frozen=True)
class Factories:
    """Makes the parts of a run from what only the run knows.

    ``levers`` are those of each stage, by its name. ``scheduler`` takes the optimizer, the warm-up steps and all steps,
    ``layout`` the model and the tasks' names.
    """

    layout: Callable[[nn.Module, Sequence[str]], AdapterLayout]
    levers: Mapping[str, Levers]
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
        resume_from: The folder of a finished run to begin with.
        resume_from_checkpoint: A run folder, a checkpoint, or ``auto``.
        references: Each task's validation score when it is trained alone, of those known.
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
    resume_from: str | None
    resume_from_checkpoint: str | None
    references: Mapping[str, float]
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
        for place, stage in enumerate(self.stages):
            stage.check_tasks(names)
            self._check_stage(stage, first=place == 0)
        self._check_selection()
        for stage in self.stages:
            self._check_levers(self.factories.levers[stage.name], stage)
        optimizer = self.factories.optimizer([nn.Parameter(torch.zeros(1))], 1e-3)
        self.factories.scheduler(optimizer, 0, 1)

    def _check_stage(self, stage: Stage, *, first: bool) -> None:
        if stage.optimizer == "carry" and first:
            stage.refuse("optimizer", "there is no stage before it whose optimizer it could take over. Take fresh")
        if stage.tasks != "weakest":
            return
        if stage.weakness in NEED_SCORES and not self.options.eval_scores:
            stage.refuse("weakness", "goes by validation scores, and eval_scores=false computes none. Set it to true")
        if stage.weakness == "reference":
            self._check_references(f"stages.{stage.name}.weakness=reference")

    def _check_selection(self) -> None:
        place = f"select_by={self.options.select_by}"
        if not place.endswith("loss_ratio") and not self.options.eval_scores:
            raise UserError(f"{place}: goes by validation scores, and eval_scores=false computes none. Set it to true.")
        if place.endswith("change"):
            self._check_references(place)

    def _check_references(self, place: str) -> None:
        if not self.references:
            raise UserError(
                f"{place}: compares with the tasks trained alone. Set reference=<folder of the single-task runs> "
                "(mtl train -m experiment=single_task)."
            )
        missing = [task.name for task in self.tasks if task.metric != "none" and task.name not in self.references]
        if missing:
            raise UserError(
                f"{place}: reference must hold a run of each task, and has none of {missing[0]}. Train it alone: mtl "
                f"train only_task={missing[0]}."
            )

    def _check_levers(self, levers: Levers, stage: Stage) -> None:
        shape = self.shape_of(stage)
        sampler = levers.sampler(shape)
        assert len(sampler.probabilities) == len(shape.names)
        for group, part in (("sampler", sampler), ("weighter", levers.weighter(shape))):
            needs: frozenset[str] = getattr(part, "needs", frozenset())
            chosen = f"{group}={levers.names[group]}"
            if not needs <= NEEDS_PROVIDED:
                raise UserError(
                    f"{chosen}: needs {sorted(needs - NEEDS_PROVIDED)}, which the loop does not compute. Take another "
                    f"{group}."
                )
            if "scores" in needs and not self.options.eval_scores:
                raise UserError(
                    f"{chosen} goes by validation scores, and eval_scores=false computes none. Set eval_scores=true, "
                    f"or take a {group} that goes by losses."
                )
        surgery = levers.surgery(shape)
        if self.options.surgery_every > 1:
            self._check_every(surgery, levers)
        effect = surgery.weights_act
        if effect in ("no", "reversed") and levers.names["weighter"] != "Equal" and not self.options.allow_ineffective:
            raise UserError(
                f"surgery={levers.names['surgery']} with weighter={levers.names['weighter']}: loss weights act "
                f"through it: {effect}. Take weighter=equal, another surgery, or allow_ineffective=true."
            )

    def shape_of(self, stage: Stage) -> StageShape:
        """The stage as one of a single step, to make strategies with before the data are read."""
        chosen = None if isinstance(stage.tasks, str) else stage.tasks
        names = [task.name for task in self.tasks if chosen is None or task.name in chosen]
        return StageShape(names, [1] * len(names), 1, self.options.batch_size)

    def _check_every(self, surgery: GradientSurgery, levers: Levers) -> None:
        every = f"surgery_every={self.options.surgery_every}"
        if not isinstance(surgery, GramianSurgery):
            raise UserError(
                f"{every}: surgery={levers.names['surgery']} has no coefficients that could be kept. Set "
                "surgery_every=1 or take another surgery."
            )
        if self.options.surgery_granularity != "global":
            raise UserError(
                f"{every}: keeps one coefficient a task, and each group of "
                f"surgery_granularity={self.options.surgery_granularity} has its own. Set one of them back."
            )


def settings_from(config: dict[str, Any], makers: Mapping[str, Maker], folder: Path) -> Settings:
    """Turns a config into settings and checks them.

    Args:
        config: The resolved config as plain data.
        makers: Of adapters, sampler, weighter, surgery, optimizer and scheduler, and of what stages have instead of the
            run's: ``stages.<name>.sampler``, say.
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
        levers={stage.name: levers_of(stage, makers, seed) for stage in stages},
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
        resume_from=config["resume_from"],
        resume_from_checkpoint=config["resume_from_checkpoint"],
        references=reference_scores(config["reference"], "reference") if config["reference"] else {},
        # The run's folder tells its config; it was not resumed, nor part of a sweep, by whoever repeats it.
        config={**config, "output_dir": str(output_dir), "resume_from_checkpoint": None, "sweep": {}},
        strategy={**strategy, "stages": "+".join(order)},
    )
    settings.check()
    return settings


def levers_of(stage: Stage, makers: Mapping[str, Maker], seed: int) -> Levers:
    """The stage's own strategies, or the run's."""
    sampler, weighter, surgery = (
        makers[group if getattr(stage, group) is None else f"stages.{stage.name}.{group}"]
        for group in ("sampler", "weighter", "surgery")
    )
    return Levers(
        sampler=lambda shape: sampler(**vars(shape), seed=seed),
        weighter=lambda shape: weighter(**vars(shape), num_tasks=len(shape.names), seed=seed),
        surgery=lambda shape: surgery(names=shape.names, seed=seed),
        names={"sampler": sampler.name, "weighter": weighter.name, "surgery": surgery.name},
    )


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
