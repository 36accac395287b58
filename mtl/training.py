"""The training loop: stages of steps, read from top to bottom.

One step: the sampler's counts, the examples, losses and gradients per task, weights, surgery, clipping, optimizer,
feedback. Shape suffixes are those of :mod:`mtl.interfaces`; T is the number of the *stage's* tasks here, and strategies
see the stage's own numbering of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from mtl.checkpoint import save_checkpoint
from mtl.data.batching import Batch
from mtl.errors import UserError
from mtl.gradients import TaskGradients, attach
from mtl.interfaces import TaskFeedback
from mtl.run import Run, StageParts
from mtl.stages import evaluation_steps
from mtl.surgery import GramianSurgery, Mean, gramian


@dataclass(frozen=True)
class StepOutcome:
    """What one step did, for feedback and records; tasks are numbered within the stage.

    ``gramian_MM`` is the raw one, of the unweighted rows; ``coefficients_M`` the surgery's answer. Both are ``None``
    where they were not computed.
    """

    tasks: Sequence[int]
    counts_M: Sequence[int]
    losses_M: Tensor
    shares_M: Tensor
    weights_T: Tensor
    probabilities_T: Sequence[float]
    gramian_MM: Tensor | None
    coefficients_M: Tensor | None
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_targets_M: Sequence[int]


def run_stages(run: Run, parts: StageParts | None = None) -> None:
    """Trains all stages, from ``run.state`` on. ``parts`` are those of a stage that a checkpoint was taken in."""
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
    run.state.stage_step = 0
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
    names = [run.names[task] for task in tasks]
    sizes = [len(run.data[task].train) for task in tasks]
    options = run.options
    batch_size = stage.batch_size or options.batch_size
    num_steps = stage.num_steps(sum(sizes), batch_size)
    learning_rate = stage.learning_rate or options.learning_rate or run.layout.default_learning_rate
    optimizer = run.factories.optimizer(run.layout.parameters(), learning_rate)
    return StageParts(
        stage=stage,
        tasks=tasks,
        num_steps=num_steps,
        batch_size=batch_size,
        sampler=run.factories.sampler(sizes, names),
        weighter=run.factories.weighter(names),
        surgery=run.factories.surgery(),
        optimizer=optimizer,
        # Never prepared: accelerate would step it once per process.
        scheduler=run.factories.scheduler(optimizer, round(options.warmup_ratio * num_steps), num_steps),
        evaluation_steps=evaluation_steps(
            num_steps, evals_per_stage=options.evals_per_stage, eval_steps=options.eval_steps
        ),
    )


def train(run: Run, parts: StageParts) -> None:
    """Trains one stage from ``run.state.stage_step`` on, until its last step or until it stops early."""
    run.model.train()
    while not finished(run, parts):
        start = time.monotonic()
        outcome = training_step(run, parts)
        run.state.step += 1
        run.state.stage_step += 1
        run.state.tokens += outcome.num_tokens
        run.state.examples_seen_T = list(run.cursors.examples_seen_T)
        for task, num_targets in zip(outcome.tasks, outcome.num_targets_M, strict=True):
            run.state.target_tokens_T[parts.tasks[task]] += num_targets
        run.state.training_seconds += time.monotonic() - start
        if run.log:
            run.log.step(run.state, parts, run.names, outcome)
        if run.state.stage_step in parts.evaluation_steps:
            evaluate_and_save(run, parts)


def training_step(run: Run, parts: StageParts) -> StepOutcome:
    """One optimizer step."""
    probabilities_T = list(parts.sampler.probabilities)
    batch = draw_batch(run, parts, parts.sampler.counts(parts.batch_size))
    tasks = [task for task, index in enumerate(parts.tasks) if batch.counts_T[index] > 0]
    shares_M = shares(run.options.share, batch, parts, tasks, probabilities_T)

    weights_T = None if parts.weighter.needs else parts.weighter.weights(None)
    # The plain mean of rows whose weights are known beforehand is one mixed backward of the objective.
    mixed = weights_T is not None and (isinstance(parts.surgery, Mean) or run.backward.num_shared == 0)
    scale_M = shares_M * weights_T[tasks] if mixed and weights_T is not None else torch.ones(len(tasks))
    gradients = run.backward(batch, spread(scale_M, parts, tasks, len(run.data)), step=run.state.step, apart=not mixed)
    check_finite(run, gradients)

    gramian_MM = None if mixed else gramian(gradients.shared_RN)
    feedback = TaskFeedback(
        step=run.state.step,
        tasks=tasks,
        counts_M=[int(batch.counts_T[parts.tasks[task]]) for task in tasks],
        losses_M=gradients.losses_M,
        gramian_MM=gramian_MM,
    )
    if weights_T is None:
        weights_T = parts.weighter.weights(feedback)
    coefficients_M = None
    if gramian_MM is not None:
        scale_M = shares_M * weights_T[tasks]
        coefficients_M = combine_rows(parts, gradients, gramian_MM, scale_M, tasks)
    attach_gradients(run, gradients)

    learning_rate = float(parts.scheduler.get_last_lr()[0])
    max_norm = float("inf") if run.options.max_grad_norm is None else run.options.max_grad_norm
    grad_norm = float(nn.utils.clip_grad_norm_(run.layout.parameters(), max_norm))
    if not math.isfinite(grad_norm):
        raise UserError(
            f"The gradient is not finite at step {run.state.step + 1}. Lower learning_rate; the last checkpoint is "
            "kept."
        )
    parts.optimizer.step()
    parts.scheduler.step()
    parts.optimizer.zero_grad(set_to_none=True)
    parts.sampler.update(feedback)
    parts.weighter.update(feedback)
    return StepOutcome(
        tasks=tasks,
        counts_M=feedback.counts_M,
        losses_M=gradients.losses_M,
        shares_M=shares_M,
        weights_T=weights_T,
        probabilities_T=probabilities_T,
        gramian_MM=gramian_MM,
        coefficients_M=coefficients_M,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_tokens=batch.num_tokens,
        num_targets_M=[int(batch.num_targets_T[parts.tasks[task]]) for task in tasks],
    )


def draw_batch(run: Run, parts: StageParts, counts_T: Sequence[int]) -> Batch:
    """Takes the next examples of each task; the same on every rank."""
    counts = [0] * len(run.data)
    for task, count in zip(parts.tasks, counts_T, strict=True):
        counts[task] = count
    rows = run.cursors.take(counts)
    return Batch([(task, run.data[task].train[row]) for task, row in rows], len(run.data))


def shares(
    kind: str, batch: Batch, parts: StageParts, tasks: Sequence[int], probabilities_T: Sequence[float]
) -> Tensor:
    """``a_t`` [M]: how much of the step's objective each present task is before weighting.

    Only ``tokens`` sums to 1 by construction of the batch alone; ``equal`` does so in expectation, at every batch
    size, which no division by the present tasks' total could achieve.
    """
    present = [parts.tasks[task] for task in tasks]
    if kind == "tokens":
        num_targets_T = torch.from_numpy(batch.num_targets_T).double()
        return num_targets_T[present] / num_targets_T.sum()
    sampled_M = torch.from_numpy(batch.counts_T).double()[present] / len(batch.examples)
    if kind == "sampled":
        return sampled_M
    p_M = torch.tensor(probabilities_T, dtype=torch.float64)[list(tasks)]
    return sampled_M / (len(parts.tasks) * p_M)


def combine_rows(
    parts: StageParts, gradients: TaskGradients, gramian_MM: Tensor, scale_M: Tensor, tasks: Sequence[int]
) -> Tensor | None:
    """Replaces the raw rows ``g_t`` by the surgery's combination of ``r_t = M a_t lambda_t g_t``, in place.

    The Gramian of the r_t follows from the raw one, so neither they nor it are computed again. Private gradients are
    scaled by share and weight like the objective, never by w.

    Returns:
        The coefficients w [M], where the surgery works by coefficients.
    """
    row_scale_M = len(tasks) * scale_M
    coefficients_M = None
    if isinstance(parts.surgery, GramianSurgery):
        coefficients_M = parts.surgery.coefficients(row_scale_M[:, None] * gramian_MM * row_scale_M, tasks)
        combined_N = (coefficients_M * row_scale_M).to(gradients.shared_RN) @ gradients.shared_RN
    else:
        combined_N = parts.surgery(gradients.shared_RN.mul_(row_scale_M.to(gradients.shared_RN)[:, None]), tasks)
    gradients.shared_RN = combined_N[None]
    for private, scale in zip(gradients.private, scale_M.tolist(), strict=True):
        private.mul_(scale)
    return coefficients_M


def attach_gradients(run: Run, gradients: TaskGradients) -> None:
    """Leaves the step's result in ``.grad``; the parameters of absent tasks keep ``None``, so Adam passes them by."""
    attach(run.layout.shared_parameters(), gradients.shared_RN[0])
    for task, private in zip(gradients.tasks, gradients.private, strict=True):
        attach(run.layout.private_parameters(task), private)


def spread(values_M: Tensor, parts: StageParts, tasks: Sequence[int], num_tasks: int) -> Tensor:
    """The present tasks' values at their places among the run's tasks, 0 elsewhere."""
    values_T = torch.zeros(num_tasks, dtype=torch.float64)
    values_T[[parts.tasks[task] for task in tasks]] = values_M.double()
    return values_T


def check_finite(run: Run, gradients: TaskGradients) -> None:
    """Stops before a NaN or infinite loss reaches the parameters."""
    for task, loss in zip(gradients.tasks, gradients.losses_M.tolist(), strict=True):
        if not math.isfinite(loss):
            raise UserError(
                f"The loss of task {run.names[task]!r} is {loss} at step {run.state.step + 1}. Lower learning_rate, or "
                "look for damaged examples; the last checkpoint is kept."
            )


def evaluate_and_save(run: Run, parts: StageParts) -> None:
    """Evaluates on validation data, tells the strategies, keeps the best parameters, writes a checkpoint."""
    evaluations = run.validate()
    tell_validation(parts, run.state.step, run.state.validation_T)
    track_best(run)
    if run.log:
        run.log.evaluation(run.state, parts.stage.name, run.names, evaluations)
    if not finished(run, parts):  # otherwise end_stage saves
        save(run, parts)


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
    ratios = run.state.loss_ratios_T
    value = sum(ratios) / len(ratios)
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
    run.state.stage += 1
    run.state.stage_tasks = None
    save(run, None)


def save(run: Run, parts: StageParts | None) -> None:
    """Writes a checkpoint at a step's end; ``parts`` is ``None`` between two stages."""
    run.distributed.check_identical(run.layout.parameters(), "The trainable parameters")
    if run.log is None:
        run.distributed.barrier()
        return
    run.state.total_seconds = time.monotonic() - run.started
    state = {
        "identity": run.identity,
        "run": asdict(run.state),
        "parameters": dict(run.layout.named_parameters()),
        "best_parameters": None if run.best_parameters is None else dict(run.best_parameters),
        "cursors": run.cursors.state_dict(),
        "parts": None
        if parts is None
        else {
            "sampler": parts.sampler.state_dict(),
            "weighter": parts.weighter.state_dict(),
            "surgery": parts.surgery.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "scheduler": parts.scheduler.state_dict(),
        },
    }
    folder = run.output_dir / "checkpoints"
    save_checkpoint(folder, run.state.step, state, keep_last=run.options.save_total_limit)
    run.distributed.barrier()
