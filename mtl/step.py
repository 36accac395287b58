"""One optimizer step: counts, examples, losses and gradients per task, weights, surgery, clipping, update, feedback.

Shape suffixes are those of :mod:`mtl.interfaces`; T is the number of the *stage's* tasks here, and strategies see the
stage's own numbering of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mtl.conflict import Conflict, measure_conflict
from mtl.data.batching import Batch
from mtl.distributed import whole
from mtl.gradients import TaskGradients, attach
from mtl.interfaces import LossWeighter, TaskFeedback
from mtl.run import Run, StageParts
from mtl.surgery import GramianSurgery, Mean
from mtl.surgery.gramian import combination


@dataclass(frozen=True)
class StepOutcome:
    """What one step did, for feedback and records; tasks are numbered within the stage.

    ``gramian_MM`` is the raw one, of the unweighted rows; ``coefficients_M`` the surgery's answer. Both are ``None``
    where they were not computed. ``rows`` lists the step's examples as (run's task, row). A step whose loss or gradient
    was not finite has updated nothing: ``finite`` is false. ``signals`` are what the sampler goes by, by name [T];
    ``conflict`` numbers tasks within the run.
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
    rows: Sequence[tuple[int, int]]
    signals: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    conflict: Conflict | None = None

    @property
    def finite(self) -> bool:
        """Whether losses and gradient were finite."""
        return math.isfinite(self.grad_norm)


def training_step(run: Run, parts: StageParts) -> StepOutcome:
    """One optimizer step."""
    probabilities_T, signals = list(parts.sampler.probabilities), dict(getattr(parts.sampler, "signals", {}))
    batch, rows = draw_batch(run, parts, parts.sampler.counts(parts.batch_size))
    tasks = [task for task, index in enumerate(parts.tasks) if batch.counts_T[index] > 0]
    shares_M = shares(run.options.share, batch, parts, tasks, probabilities_T)

    weights_T = None if needs_rows(parts.weighter) else parts.weighter.weights(None)
    # The plain mean of rows whose weights are known beforehand is one mixed backward of the objective.
    mixed = weights_T is not None and (isinstance(parts.surgery, Mean) or run.backward.num_shared == 0)
    scale_M = shares_M * weights_T[tasks] if mixed and weights_T is not None else torch.ones(len(tasks))
    run.backward.loss_scale = run.loss_scale.scale
    conflict = measure_conflict(run, batch)
    gradients = run.backward(batch, spread(scale_M, parts, tasks, len(run.data)), step=run.state.step, apart=not mixed)

    gramian_MM = None if mixed else run.backward.gramian(gradients.shared_RN)
    feedback = feedback_of(run, parts, batch, tasks, gradients.losses_M, gramian_MM)
    coefficients_M = None
    # Surgery and weighter never see a NaN: their state would keep it.
    finite = bool(gradients.losses_M.isfinite().all()) and (gramian_MM is None or bool(gramian_MM.isfinite().all()))
    if finite:
        if weights_T is None:
            weights_T = parts.weighter.weights(feedback)
        if gramian_MM is not None:
            coefficients_M = combine_rows(parts, gradients, gramian_MM, shares_M * weights_T[tasks], tasks)
    learning_rate = float(parts.scheduler.get_last_lr()[0])
    grad_norm = update(run, parts, gradients) if finite else math.nan
    with warnings.catch_warnings():
        # A step that updated nothing still counts in the schedule; torch takes that for a mistake, were it the first.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        parts.scheduler.step()
    if math.isfinite(grad_norm):
        if any("losses_after" in getattr(part, "needs", ()) for part in (parts.sampler, parts.weighter)):
            losses_after_M = run.backward.losses(batch, step=run.state.step, apart=not mixed)
            feedback = replace(feedback, losses_after_M=losses_after_M)
        parts.sampler.update(feedback)
        parts.weighter.update(feedback)
    return StepOutcome(
        tasks=tasks,
        counts_M=feedback.counts_M,
        losses_M=gradients.losses_M,
        shares_M=shares_M,
        weights_T=torch.ones(len(parts.tasks), dtype=torch.float64) if weights_T is None else weights_T,
        probabilities_T=probabilities_T,
        gramian_MM=gramian_MM,
        coefficients_M=coefficients_M,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_tokens=batch.num_tokens,
        num_targets_M=feedback.num_targets_M or [],
        rows=rows,
        signals=signals,
        conflict=conflict,
    )


def feedback_of(
    run: Run, parts: StageParts, batch: Batch, tasks: Sequence[int], losses_M: Tensor, gramian_MM: Tensor | None
) -> TaskFeedback:
    """What strategies see of a step."""
    present = [parts.tasks[task] for task in tasks]
    return TaskFeedback(
        step=run.state.step,
        tasks=tasks,
        counts_M=batch.counts_T[present].tolist(),
        losses_M=losses_M,
        gramian_MM=gramian_MM,
        num_targets_M=batch.num_targets_T[present].tolist(),
    )


def needs_rows(weighter: LossWeighter) -> bool:
    """Whether its weights are known only after the losses, so that the tasks' gradients must be kept apart."""
    return not weighter.needs.isdisjoint({"losses", "gramian"})


def draw_batch(run: Run, parts: StageParts, counts_T: Sequence[int]) -> tuple[Batch, list[tuple[int, int]]]:
    """Takes the next examples of each task, and says which rows they are; the same on every rank."""
    counts = [0] * len(run.data)
    for task, count in zip(parts.tasks, counts_T, strict=True):
        counts[task] = count
    rows = run.cursors.take(counts)
    return batch_of(run, rows), rows


def batch_of(run: Run, rows: Sequence[tuple[int, int]]) -> Batch:
    """The batch of these (task, row) pairs."""
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
        combined_N = combination(coefficients_M * row_scale_M, gradients.shared_RN)
    else:
        combined_N = parts.surgery(gradients.shared_RN.mul_(row_scale_M.to(gradients.shared_RN)[:, None]), tasks)
    gradients.shared_RN = combined_N[None]
    for private, scale in zip(gradients.private, scale_M.tolist(), strict=True):
        private.mul_(scale)
    return coefficients_M


def update(run: Run, parts: StageParts, gradients: TaskGradients) -> float:
    """Clips the gradient and steps the optimizer, unless the gradient is not finite.

    The parameters that no present task trains keep ``None`` as their gradient, so Adam passes them by.

    Returns:
        The gradient's norm before clipping.
    """
    if parts.trains_shared:
        attach(run.layout.shared_parameters(), gradients.shared_RN[0])
        for parameter in run.layout.idle_parameters(gradients.tasks):
            parameter.grad = None
    for task, private in zip(gradients.tasks, gradients.private, strict=True):
        if parts.trains_private(task):
            attach(run.layout.private_parameters(task), private)
    max_norm = math.inf if run.options.max_grad_norm is None else run.options.max_grad_norm
    grad_norm = float(whole(nn.utils.clip_grad_norm_(parts.parameters, max_norm)))
    if math.isfinite(grad_norm):
        parts.optimizer.step()
        pull_to_start(parts)
    parts.optimizer.zero_grad(set_to_none=True)
    return grad_norm


@torch.no_grad()
def pull_to_start(parts: StageParts) -> None:
    """``theta -= lr l2_to_start (theta - theta_start)`` for what this step has moved.

    Apart from the gradient, since Adam would divide a coupled pull by the size of the gradients, as it does with weight
    decay (Loshchilov and Hutter, ICLR 2019).
    """
    factor = parts.stage.l2_to_start * float(parts.scheduler.get_last_lr()[0])
    for parameter, start in parts.anchors:
        if parameter.grad is not None:
            parameter.lerp_(start, factor)


def spread(values_M: Tensor, parts: StageParts, tasks: Sequence[int], num_tasks: int) -> Tensor:
    """The present tasks' values at their places among the run's tasks, 0 elsewhere."""
    values_T = torch.zeros(num_tasks, dtype=torch.float64)
    values_T[[parts.tasks[task] for task in tasks]] = values_M.double()
    return values_T
