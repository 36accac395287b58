"""The best parameters of a stage, by validation data: of all tasks together, and each task's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mtl.guard import copied, falls_now, harmed, put, trying
from mtl.run import Run, StageParts


def track_best(run: Run, parts: StageParts) -> None:
    """Remembers the parameters of the highest objective, if early stopping is on; one that harms never counts."""
    if run.options.early_stopping_patience is None:
        return
    value = -run.objective(run.state.validation_T)
    harms = parts.stage.guard != "none" and bool(harmed(parts.stage, falls_now(run, parts)))
    if not harms and (run.state.best_value is None or value < run.state.best_value):
        run.state.best_value, run.state.best_stage_step = value, run.state.stage_step
        run.state.num_bad_evaluations = 0
        run.best_parameters = copied(run)
    else:
        run.state.num_bad_evaluations += 1


def track_tasks(run: Run, parts: StageParts) -> list[int]:
    """Remembers each task's own parameters at its lowest validation loss; returns the tasks that have just converged.

    A task has converged after ``task_patience`` evaluations without a lower loss. With ``when_converged=freeze`` its
    own parameters go back to the best ones and are trained no further; with ``floor`` it is sampled less.
    """
    patience = run.options.task_patience
    if patience is None:
        return []
    newly = []
    for task in parts.focus:
        if task in run.state.converged:
            continue
        loss = run.state.validation_T[task]["loss"]
        best = run.state.task_best.get(task)
        if best is None or loss < best["loss"]:
            run.state.task_best[task] = {"loss": loss, "step": run.state.stage_step, "bad": 0}
            run.best_private[task] = copied(run, private_names(run, task))
            continue
        best["bad"] += 1
        if best["bad"] >= patience:
            newly.append(task)
    run.state.converged = sorted([*run.state.converged, *newly])
    if run.options.when_converged == "freeze":
        for task in newly:
            put(run, run.best_private[task])
    parts.tell_converged(run.state.converged, run.options.when_converged)
    return newly


def private_names(run: Run, task: int) -> list[str]:
    """Names of the task's own parameters."""
    own = {id(parameter) for parameter in run.layout.private_parameters(task)}
    return [name for name, parameter in run.layout.named_parameters().items() if id(parameter) in own]


def put_back_best(run: Run) -> bool:
    """Goes back to the best parameters of the stage, if they were not the last; says whether anything changed."""
    if run.best_parameters is None or run.state.best_stage_step == run.state.stage_step:
        return False
    put(run, run.best_parameters)
    return True


def candidates(run: Run) -> dict[int, Mapping[str, Tensor]]:
    """Each task's own best parameters, where they are others than those in place."""
    now = copied(run)
    return {
        task: values
        for task, values in run.best_private.items()
        if any(not bool((now[name] == value).all()) for name, value in values.items())
    }


def put_own_bests(run: Run) -> Sequence[int]:
    """Gives each task its own best parameters where that lowers its validation loss; returns these tasks.

    The shared parameters have moved on since, so that is validated: one task's own act on no other task, and a single
    evaluation tells for each. ``run.validation`` is that of the parameters as they are, before and after.
    """
    found = candidates(run)
    if not found:
        return []
    assert run.validation is not None
    with trying(run, {name: value for values in found.values() for name, value in values.items()}):
        tried = run.evaluate_validation()
    better = [task for task in found if tried[task].loss < run.validation[task].loss]
    for task in better:
        put(run, found[task])
    run.keep_validation([tried[task] if task in better else item for task, item in enumerate(run.validation)])
    return better
