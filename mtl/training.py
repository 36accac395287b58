"""The training loop: stages of steps, read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch.optim import Optimizer

from mtl.checkpoint import save_checkpoint
from mtl.distributed import whole_state
from mtl.errors import Stopped, UserError
from mtl.gradients import group_sizes
from mtl.interfaces import GradientSurgery, TaskFeedback
from mtl.run import Run, StageParts
from mtl.settings import StageShape
from mtl.stages import evaluation_steps
from mtl.step import training_step
from mtl.surgery import Every, GramianSurgery, Grouped, Mean
from mtl.trouble import handle_non_finite
from mtl.zero import ZeroOptimizer


def run_stages(run: Run, parts: StageParts | None = None) -> None:
    """Trains all stages, from ``run.state`` on. ``parts`` are those of a stage that a checkpoint was taken in.

    Raises:
        Stopped: The run was asked to stop; a checkpoint has been saved.
        UserError: Losses or memory went astray, or a checkpoint can't be written.
    """
    while run.state.stage < len(run.stages):
        parts = parts or begin_stage(run)
        train(run, parts)
        end_stage(run, parts)
        parts = None


def begin_stage(run: Run) -> StageParts:
    """Selects the stage's tasks, makes its parts and tells them where the tasks stand."""
    stage = run.stages[run.state.stage]
    improvements_T = [1 - ratio for ratio in run.state.loss_ratios_T]
    run.state.stage_tasks = stage.select_tasks(run.names, improvements_T)
    run.state.stage_step = run.state.evaluated_stage_step = 0
    run.state.best_value, run.state.best_stage_step, run.state.num_bad_evaluations = None, 0, 0
    run.best_parameters = None
    parts = make_parts(run)
    for step, validation_T in ((0, run.state.base_validation_T), (run.state.step, run.state.validation_T)):
        tell_validation(parts, step, validation_T)
    if run.log:
        run.log.begin_stage(run.state, parts, run.names)
    return parts


def make_parts(run: Run) -> StageParts:
    """Fresh sampler, weighter, surgery, optimizer and schedule for the stage that ``run.state`` is in."""
    stage = run.stages[run.state.stage]
    assert run.state.stage_tasks is not None
    tasks = run.state.stage_tasks
    sizes = [len(run.data[task].train) for task in tasks]
    options = run.options
    batch_size = stage.batch_size or options.batch_size
    num_steps = stage.num_steps(sum(sizes), batch_size)
    shape = StageShape([run.names[task] for task in tasks], sizes, num_steps, batch_size)
    learning_rate = stage.learning_rate or options.learning_rate or run.layout.default_learning_rate
    optimizer = make_optimizer(run, learning_rate)
    return StageParts(
        stage=stage,
        tasks=tasks,
        num_steps=num_steps,
        batch_size=batch_size,
        sampler=run.factories.sampler(shape),
        weighter=run.factories.weighter(shape),
        surgery=make_surgery(run, shape),
        optimizer=optimizer,
        # Never prepared: accelerate would step it once per process.
        scheduler=run.factories.scheduler(optimizer, round(options.warmup_ratio * num_steps), num_steps),
        evaluation_steps=evaluation_steps(
            num_steps, evals_per_stage=options.evals_per_stage, eval_steps=options.eval_steps
        ),
    )


def make_surgery(run: Run, shape: StageShape) -> GradientSurgery:
    """The stage's surgery: of whole gradients or of groups of parameters, at every step or now and then."""
    surgery = run.factories.surgery(shape)
    if isinstance(surgery, Mean):  # the same whatever it looks at together
        return surgery
    if run.options.surgery_granularity != "global":
        sizes = group_sizes(run.layout, run.options.surgery_granularity)
        return Grouped(lambda: run.factories.surgery(shape), sizes) if sizes else surgery
    if run.options.surgery_every > 1 and isinstance(surgery, GramianSurgery):
        return Every(surgery, run.options.surgery_every)
    return surgery


def make_optimizer(run: Run, learning_rate: float) -> Optimizer:
    """Of all trainable parameters; spread over the ranks where the launch asks for it."""
    stage = run.distributed.zero_stage
    if stage in (0, 1, 2):
        return ZeroOptimizer(
            lambda parameters: run.factories.optimizer(parameters, learning_rate),
            run.layout,
            run.distributed,
            stage=stage,
        )
    return run.factories.optimizer(run.layout.parameters(), learning_rate)


def train(run: Run, parts: StageParts) -> None:
    """Trains one stage from ``run.state.stage_step`` on, until its last step or until it stops early."""
    run.model.train()
    evaluate_if_due(run, parts)  # a run that was asked to stop may have put this off
    while not finished(run, parts):
        start = time.monotonic()
        outcome = training_step(run, parts)
        if outcome.finite:
            run.loss_scale.succeeded()
        else:
            handle_non_finite(run, parts, outcome)
        run.state.step += 1
        run.state.stage_step += 1
        run.state.tokens += outcome.num_tokens
        run.state.examples_seen_T = list(run.cursors.examples_seen_T)
        for task, num_targets in zip(outcome.tasks, outcome.num_targets_M, strict=True):
            run.state.target_tokens_T[parts.tasks[task]] += num_targets
        run.state.training_seconds += time.monotonic() - start
        if run.log:
            run.log.step(run.state, parts, run.names, outcome)
        with saved_when_stopped(run, parts):
            run.check_stop()
        evaluate_if_due(run, parts)


def evaluate_if_due(run: Run, parts: StageParts) -> None:
    """Evaluates on validation data, tells the strategies, keeps the best parameters, writes a checkpoint."""
    if run.state.stage_step not in parts.evaluation_steps or run.state.stage_step == run.state.evaluated_stage_step:
        return
    with saved_when_stopped(run, parts):
        evaluations = run.validate()
    run.state.evaluated_stage_step = run.state.stage_step
    tell_validation(parts, run.state.step, run.state.validation_T)
    track_best(run)
    if run.log:
        run.log.evaluation(run.state, parts.stage.name, run.names, evaluations)
    if not finished(run, parts):  # otherwise end_stage saves
        save(run, parts)


@contextmanager
def saved_when_stopped(run: Run, parts: StageParts) -> Iterator[None]:
    """Saves before the run ends because it was asked to stop within the block."""
    try:
        yield
    except Stopped:
        save(run, parts)
        raise


def tell_validation(parts: StageParts, step: int, validation_T: Sequence[Mapping[str, float]]) -> None:
    """Hands validation results of all the run's tasks to the stage's strategies, as feedback without a present task."""
    validation = {index: validation_T[task] for index, task in enumerate(parts.tasks)}
    feedback = TaskFeedback(step, (), (), torch.empty(0, dtype=torch.float64), validation=validation)
    parts.sampler.update(feedback)
    parts.weighter.update(feedback)


def track_best(run: Run) -> None:
    """Remembers the parameters with the lowest mean of val loss / base val loss, if early stopping is on."""
    if run.options.early_stopping_patience is None:
        return
    value = run.state.mean_loss_ratio
    if run.state.best_value is None or value < run.state.best_value:
        run.state.best_value, run.state.best_stage_step = value, run.state.stage_step
        run.state.num_bad_evaluations = 0
        run.best_parameters = {
            name: parameter.detach().clone() for name, parameter in run.layout.named_parameters().items()
        }
    else:
        run.state.num_bad_evaluations += 1


def finished(run: Run, parts: StageParts) -> bool:
    """Whether the stage has had its steps, or its last ``early_stopping_patience`` evaluations brought nothing."""
    patience = run.options.early_stopping_patience
    stopped_early = patience is not None and run.state.num_bad_evaluations >= patience
    return stopped_early or run.state.stage_step >= parts.num_steps


def end_stage(run: Run, parts: StageParts) -> None:
    """Goes back to the best parameters of the stage, if they were not the last, and on to the next stage."""
    if run.best_parameters is not None and run.state.best_stage_step < run.state.stage_step:
        with torch.no_grad():
            for name, parameter in run.layout.named_parameters().items():
                parameter.copy_(run.best_parameters[name])
        with saved_when_stopped(run, parts):
            evaluations = run.validate()
        if run.log:
            run.log.evaluation(run.state, parts.stage.name, run.names, evaluations)
    if run.log:
        run.log.end_stage()
    run.state.history.append(
        {
            "stage": parts.stage.name,
            "tasks": [run.names[task] for task in parts.tasks],
            "steps": run.state.stage_step,
            "best_step": run.state.best_stage_step if run.best_parameters is not None else run.state.stage_step,
        }
    )
    if isinstance(parts.optimizer, ZeroOptimizer):
        parts.optimizer.close()
    run.state.stage += 1
    run.state.stage_tasks = None
    save(run, None)


def save(run: Run, parts: StageParts | None) -> None:
    """Writes a checkpoint at a step's end; ``parts`` is ``None`` between two stages.

    Raises:
        UserError: On every rank, if rank 0 can't write it.
    """
    run.distributed.check_identical(run.layout.parameters(), "The trainable parameters")
    run.state.total_seconds = time.monotonic() - run.started
    run.state.num_records = run.log.synced_records() if run.log else 0
    state = {
        "identity": run.identity,
        "run": asdict(run.state),
        "loss_scale": run.loss_scale.state_dict(),
        "parameters": dict(run.layout.named_parameters()),
        "best_parameters": None if run.best_parameters is None else dict(run.best_parameters),
        "cursors": run.cursors.state_dict(),
        "parts": None if parts is None else parts.state_dict(),
    }
    state = whole_state(state, keep=run.distributed.is_main)
    mistake = None
    if run.distributed.is_main:
        try:
            save_checkpoint(
                run.output_dir / "checkpoints",
                run.state.step,
                state,
                environment=run.environment,
                value=run.state.mean_loss_ratio,
                keep_last=run.options.keep_last,
                keep_best=run.options.keep_best,
            )
        except OSError as error:
            mistake = (
                f"The checkpoint of step {run.state.step} can't be written to {run.output_dir}: "
                f"{error.strerror or error}. The last good checkpoint is kept; make room, then go on with "
                "resume_from_checkpoint=auto."
            )
    mistake = run.distributed.broadcast_object(mistake)
    if mistake:
        raise UserError(mistake)
