"""A run: the parts the loop works with, and every number it needs to go on after an interruption."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtl.data.cursors import TaskCursors
from mtl.data.loading import TaskData
from mtl.distributed import Distributed, is_shard, shard_like
from mtl.errors import Stopped
from mtl.evaluation.evaluate import Progress, evaluate
from mtl.evaluation.objectives import objective_of
from mtl.evaluation.results import TaskEvaluation
from mtl.gradients import Backward
from mtl.interfaces import AdapterLayout, GradientSurgery, LossWeighter, TaskSampler
from mtl.interrupt import StopSignal
from mtl.loss_scale import LossScale
from mtl.options import Options
from mtl.reporting.run_log import RunLog
from mtl.samplers.converged import Converged
from mtl.settings import Factories
from mtl.stages import Stage

STATEFUL_PARTS = ("sampler", "weighter", "surgery", "optimizer", "scheduler")


@dataclass
class RunState:
    """Everything that counts; a checkpoint holds it whole. Indices of tasks are the run's, not a stage's.

    ``stage_tasks`` are those that the stage samples, ``stage_focus`` those that it is for (the others it replays), and
    ``stage_weakness_T`` what they were chosen by. ``evaluated_stage_step`` is the stage's step of its newest
    evaluation; ``num_records`` how many lines ``metrics.jsonl`` had when the state was saved. ``task_best`` holds, for
    tasks of the stage, the lowest validation loss, the stage's step that had it, and the evaluations since (``bad``).
    """

    num_tasks: int
    step: int = 0
    stage: int = 0
    stage_step: int = 0
    stage_tasks: list[int] | None = None
    stage_focus: list[int] | None = None
    stage_weakness_T: list[float | None] | None = None
    evaluated_stage_step: int = 0
    num_skipped_steps: int = 0
    num_records: int = 0
    tokens: int = 0
    training_seconds: float = 0.0
    total_seconds: float = 0.0
    examples_seen_T: list[int] = field(default_factory=list)
    target_tokens_T: list[int] = field(default_factory=list)
    base_validation_T: list[dict[str, float]] = field(default_factory=list)
    validation_T: list[dict[str, float]] = field(default_factory=list)
    best_value: float | None = None
    best_stage_step: int = 0
    num_bad_evaluations: int = 0
    best_score_T: list[float | None] = field(default_factory=list)
    task_best: dict[int, dict[str, float]] = field(default_factory=dict)
    converged: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.examples_seen_T = self.examples_seen_T or [0] * self.num_tasks
        self.target_tokens_T = self.target_tokens_T or [0] * self.num_tasks
        self.best_score_T = self.best_score_T or [None] * self.num_tasks

    @property
    def loss_ratios_T(self) -> list[float]:
        """Newest validation loss over that of the base model, of each task."""
        pairs = zip(self.validation_T, self.base_validation_T, strict=True)
        return [now["loss"] / base["loss"] for now, base in pairs]


@dataclass
class StageParts:
    """What lives as long as one stage. Strategies number its tasks from 0; ``tasks`` gives the run's indices.

    ``focus`` are those that the stage is for, the rest of ``tasks`` are replayed. ``parameters`` are what it trains;
    ``anchors`` pairs them with their values at its beginning, where they are pulled back to these.
    """

    stage: Stage
    tasks: list[int]
    focus: list[int]
    num_steps: int
    batch_size: int
    sampler: TaskSampler
    weighter: LossWeighter
    surgery: GradientSurgery
    optimizer: Optimizer
    scheduler: LRScheduler
    evaluation_steps: frozenset[int]
    parameters: list[nn.Parameter]
    anchors: Sequence[tuple[nn.Parameter, Tensor]] = ()
    frozen: Sequence[int] = ()

    def trains_private(self, task: int) -> bool:
        """Whether the task's own parameters move."""
        return self.stage.trainable != "shared" and task not in self.frozen

    @property
    def trains_shared(self) -> bool:
        """Whether the shared parameters move."""
        return self.stage.trainable != "private"

    def tell_converged(self, tasks: Sequence[int], when: str) -> None:
        """Freezes these tasks of the run, or lets the sampler pass them by (``when`` is ``freeze`` or ``floor``)."""
        if when == "freeze":
            self.frozen = tasks
        elif isinstance(self.sampler, Converged):
            self.sampler.converged = [index for index, task in enumerate(self.tasks) if task in tasks]

    def state_dict(self) -> dict[str, Any]:
        """The state of each part, with the name of its class."""
        return {
            name: {"class": class_name(getattr(self, name)), "state": getattr(self, name).state_dict()}
            for name in STATEFUL_PARTS
        }

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Puts the parts' states back; a part of another class starts afresh, and its name is returned."""
        changed = [name for name in STATEFUL_PARTS if state[name]["class"] != class_name(getattr(self, name))]
        for name in STATEFUL_PARTS:
            if name not in changed:
                part_state = state[name]["state"]
                getattr(self, name).load_state_dict(
                    sharded_moments(part_state, self.optimizer) if name == "optimizer" else part_state
                )
        return changed


def class_name(part: object) -> str:
    """Of a part of a stage, or of what it wraps."""
    return type(getattr(part, "inner", part)).__name__


def sharded_moments(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's saved state, with what has the shape of its parameter spread over the ranks like that."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(map(is_shard, parameters)):
        return state
    moments = {
        index: {
            key: shard_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": moments}


@dataclass
class Run:
    """The parts of a run. ``log`` is ``None`` on all ranks but the first.

    ``references_T`` are the scores of the tasks trained alone. ``start_parameters`` are those that the stage began
    with, if it goes by them, and ``start_validation`` is their evaluation; ``best_parameters`` are those of its best
    evaluation so far, if early stopping is on, and ``best_private`` each task's own ones of its lowest loss, if
    ``task_patience`` is. ``carried`` is the state of the last stage's optimizer by the names of the parameters, if
    another stage begins with it. ``validation`` is the newest validation in full, of the parameters as they are.
    ``identity`` says what a checkpoint must have in common with the run, ``environment`` what it should have for the
    same bits; ``started`` when the run began, less the time that it was interrupted.
    """

    options: Options
    stages: Sequence[Stage]
    factories: Factories
    output_dir: Path
    distributed: Distributed
    model: Any
    tokenizer: Any
    layout: AdapterLayout
    data: Sequence[TaskData]
    cursors: TaskCursors
    backward: Backward
    state: RunState
    log: RunLog | None
    identity: Mapping[str, Any]
    environment: Mapping[str, Any]
    loss_scale: LossScale
    stop: StopSignal
    started: float = field(default_factory=time.monotonic)
    references_T: Sequence[float | None] = ()
    start_parameters: Mapping[str, Tensor] | None = None
    start_validation: Sequence[TaskEvaluation] | None = None
    best_parameters: Mapping[str, Tensor] | None = None
    best_private: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    carried: Mapping[str, dict[str, Any]] | None = None
    validation: Sequence[TaskEvaluation] | None = None

    @property
    def names(self) -> list[str]:
        """Of the run's tasks."""
        return [data.task.name for data in self.data]

    def work(self, label: str) -> AbstractContextManager[Progress | None]:
        """A progress bar on rank 0, nothing elsewhere."""
        return self.log.work(label) if self.log else nullcontext()

    def check_stop(self) -> None:
        """Ends the run if any rank was asked to stop; ranks call it at the same points.

        Raises:
            Stopped: On every rank.
        """
        number = self.distributed.largest(self.stop.received)
        if number:
            raise Stopped(
                number,
                f"Stopped by {Signals(number).name} after step {self.state.step}, with everything saved. To go on: the "
                f"same command with output_dir={self.output_dir} resume_from_checkpoint=auto.",
            )

    def activate(self, task: int | None) -> AbstractContextManager[None]:
        """The layout's ``activate`` for evaluations, which can be stopped between two tasks."""
        self.check_stop()
        return self.layout.activate(task)

    def evaluate(self, split: str, max_examples: int | None, *, predict: bool) -> list[TaskEvaluation]:
        """Evaluates all tasks, each with its own adapters; identical on every rank."""
        with self.work(f"evaluating {split}") as progress:
            return evaluate(
                self.model,
                self.tokenizer,
                self.activate,
                self.data,
                split=split,
                max_examples=max_examples,
                predict=predict,
                distributed=self.distributed,
                token_budget=self.options.eval_micro_batch_tokens,
                progress=progress,
            )

    def evaluate_validation(self) -> list[TaskEvaluation]:
        """Evaluates the parameters as they are on validation data."""
        return self.evaluate("val", self.options.max_eval_examples, predict=self.options.eval_scores)

    def validate(self) -> Sequence[TaskEvaluation]:
        """Evaluates on validation data and keeps the result as the newest."""
        return self.keep_validation(self.evaluate_validation())

    def keep_validation(self, evaluations: Sequence[TaskEvaluation]) -> Sequence[TaskEvaluation]:
        """Makes it the newest: the evaluation of the parameters as they are."""
        self.validation = evaluations
        self.state.validation_T = summaries(evaluations)
        pairs = zip(self.state.best_score_T, evaluations, strict=True)
        self.state.best_score_T = [
            best if item.score is None else max(item.score, -1.0 if best is None else best) for best, item in pairs
        ]
        return evaluations

    def objective(self, validation_T: Sequence[Mapping[str, float]]) -> float:
        """How well all tasks do by ``select_by``; higher is better."""
        return objective_of(self.options.select_by, validation_T, self.state.base_validation_T, self.references_T)


def summaries(evaluations: Sequence[TaskEvaluation]) -> list[dict[str, float]]:
    """Loss and, where there is one, score of each task: what strategies see of an evaluation."""
    return [{"loss": item.loss} | ({} if item.score is None else {"score": item.score}) for item in evaluations]
