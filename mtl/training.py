"""The training loop: stages of steps, read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from mtl.best import put_back_best, put_own_bests, track_best, track_tasks
from mtl.checkpoint import save_checkpoint
from mtl.distributed import whole_state
from mtl.errors import Stopped, UserError
from mtl.guard import copied, guard_stage, put, start_validation
from mtl.interfaces import TaskFeedback
from mtl.run import Run, StageParts
from mtl.stage_parts import make_parts, select_tasks, state_by_name
from mtl.step import training_step
from mtl.trouble import handle_non_finite
from mtl.zero import ZeroOptimizer

CONVERGED = {"freeze": "its own parameters are frozen", "floor": "it is sampled less"}


def run_stages(run: Run, parts: StageParts | None = None) -> None:
    """Trains all stages, from ``run.state`` on. ``parts`` are those of a stage that a checkpoint was taken in.

    Raises:
        Stopped: The run was asked to stop; a checkpoint has been saved.
        UserError: Losses or memory went astray, or a checkpoint can't be written.
    """
    while run.state.stage < len(run.stages):
        parts = parts or begin_stage(run)
        if parts is None:
            skip_stage(run)
            continue
        train(run, parts)
        end_stage(run, parts)
        parts = None


def begin_stage(run: Run) -> StageParts | None:
    """Selects the stage's tasks, makes its parts and tells them where the tasks stand; ``None`` if no task is weak."""
    stage = run.stages[run.state.stage]
    run.state.stage_step = run.state.evaluated_stage_step = 0
    run.state.best_value, run.state.best_stage_step, run.state.num_bad_evaluations = None, 0, 0
    run.state.task_best, run.state.converged = {}, []
    run.best_parameters, run.best_private = None, {}
    run.start_parameters = copied(run) if stage.keeps_start else None
    run.start_validation = run.validation
    if not select_tasks(run):
        return None
    parts = make_parts(run)
    for step, validation_T in ((0, run.state.base_validation_T), (run.state.step, run.state.validation_T)):
        tell_validation(parts, step, validation_T)
    if run.log:
        run.log.begin_stage(run.state, parts, run.names)
    return parts


def skip_stage(run: Run) -> None:
    """Goes on to the next stage, since this one has no task."""
    stage = run.stages[run.state.stage]
    reason = f"no task is weak by weakness={stage.weakness}"
    if run.log:
        run.log.say(f"Stage {stage.name}: skipped, {reason}")
    leave_stage(run, {"stage": stage.name, "tasks": [], "steps": 0, "skipped": reason, **weakness_record(run)})


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
        if parts.stage.guard != "none":
            start_validation(run)
        evaluations = run.validate()
    run.state.evaluated_stage_step = run.state.stage_step
    tell_validation(parts, run.state.step, run.state.validation_T)
    track_best(run, parts)
    converged = track_tasks(run, parts)
    if run.log:
        run.log.evaluation(run.state, parts.stage.name, run.names, evaluations)
        for task in converged:
            run.log.say(f"  {run.names[task]} has converged: {CONVERGED[run.options.when_converged]}")
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


def finished(run: Run, parts: StageParts) -> bool:
    """Whether the stage has had its steps, or its last ``early_stopping_patience`` evaluations brought nothing.

    So it has where every task that it is for has converged.
    """
    patience = run.options.early_stopping_patience
    stopped_early = patience is not None and run.state.num_bad_evaluations >= patience
    all_converged = set(parts.focus) <= set(run.state.converged)
    return stopped_early or all_converged or run.state.stage_step >= parts.num_steps


def end_stage(run: Run, parts: StageParts) -> None:
    """Goes back to the stage's best parameters, undoes what harms another task, and goes on to the next stage."""
    with saved_when_stopped(run, parts):
        record = settle(run, parts)
    if run.log:
        run.log.end_stage()
        run.log.stage_ended(record)
    if isinstance(parts.optimizer, ZeroOptimizer):
        parts.optimizer.close()
    leave_stage(run, record, carried=state_by_name(run, parts) if carries_on(run) else None)


def settle(run: Run, parts: StageParts) -> dict[str, Any]:
    """Chooses the parameters that the stage ends with, by validation data, and returns the record of the stage.

    Stopped within, it leaves nothing half done: what it does is a function of the stage's state, and done again.
    """
    names, guards = run.names, parts.stage.guard != "none"
    with left_as_found(run) if guards or run.best_private else nullcontext():
        changed = put_back_best(run)
        if changed:
            run.validate()
        elif run.validation is None:  # the stage was resumed at its end
            run.keep_validation(run.evaluate_validation())
        own = put_own_bests(run)
        guarded = guard_stage(run, parts) if guards else None
    if run.log and (changed or own or (guarded and guarded["harmed"])):
        assert run.validation is not None
        run.log.evaluation(run.state, parts.stage.name, names, run.validation)
    record = {
        "stage": parts.stage.name,
        "tasks": [names[task] for task in parts.focus],
        "replayed": [names[task] for task in parts.tasks if task not in parts.focus],
        "steps": run.state.stage_step,
        "best_step": run.state.best_stage_step if run.best_parameters is not None else run.state.stage_step,
        "converged": [names[task] for task in run.state.converged],
        "own_best": [names[task] for task in own],
        **weakness_record(run),
    }
    return record if guarded is None else {**record, "guard": {"action": parts.stage.guard, **guarded}}


@contextmanager
def left_as_found(run: Run) -> Iterator[None]:
    """Puts everything back if the run is stopped within the block, for a checkpoint of what was before."""
    parameters, validation, validation_T = copied(run), run.validation, run.state.validation_T
    best_score_T = run.state.best_score_T
    try:
        yield
    except Stopped:
        put(run, parameters)
        run.validation, run.state.validation_T, run.state.best_score_T = validation, validation_T, best_score_T
        raise


def weakness_record(run: Run) -> dict[str, Any]:
    """What the stage's tasks were chosen by."""
    stage, values_T = run.stages[run.state.stage], run.state.stage_weakness_T
    if values_T is None:
        return {}
    return {"weakness": {"by": stage.weakness, "tasks": dict(zip(run.names, values_T, strict=True))}}


def carries_on(run: Run) -> bool:
    """Whether the next stage begins with this one's optimizer."""
    rest = run.stages[run.state.stage + 1 :]
    return bool(rest) and rest[0].optimizer == "carry"


def leave_stage(run: Run, record: dict[str, Any], carried: dict[str, Any] | None = None) -> None:
    """Ends the stage with its record and a checkpoint."""
    run.state.history.append(record)
    run.carried = carried
    run.state.stage += 1
    run.state.stage_tasks = run.state.stage_focus = run.state.stage_weakness_T = None
    run.state.task_best, run.state.converged = {}, []
    run.start_parameters = run.start_validation = run.best_parameters = None
    run.best_private = {}
    run.backward.anchor = None
    run.cursors.limit([], None)
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
        **{
            key: None if parameters is None else dict(parameters)
            for key, parameters in (
                ("best_parameters", run.best_parameters),
                ("start_parameters", run.start_parameters),
            )
        },
        "best_private": {task: dict(parameters) for task, parameters in run.best_private.items()},
        "carried": None if run.carried is None else dict(run.carried),
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
                value=-run.objective(run.state.validation_T),
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
