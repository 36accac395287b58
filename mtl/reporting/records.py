"""The records of a run as plain dicts: lines of ``metrics.jsonl`` and ``timings.jsonl``.

Shape suffixes: T tasks of the stage, M tasks present in the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl.evaluation.results import TaskEvaluation


def step_record(
    names_T: Sequence[str],
    *,
    step: int,
    stage: str,
    tasks: Sequence[int],
    counts_M: Sequence[int],
    losses_M: Sequence[float],
    shares_M: Sequence[float],
    probabilities_T: Sequence[float],
    weights_T: Sequence[float],
    objective: float,
    grad_norm: float,
    learning_rate: float,
    tokens: int,
    target_tokens: int,
    skipped: bool = False,
    coefficients_M: Sequence[float] | None = None,
    gramian_MM: Sequence[Sequence[float]] | None = None,
) -> dict[str, Any]:
    """One optimizer step. Everything in it is a function of seed and config, so equal runs leave equal lines.

    Args:
        names_T: The stage's tasks.
        tasks: Indices into ``names_T`` of the present tasks, ascending; absent tasks have no loss, count or share.
        shares_M: ``a_t``, the tasks' parts of the objective before weighting.
        weights_T: ``lambda_t``, the loss weights.
        grad_norm: Norm of the applied gradient before clipping.
        tokens: Tokens of the step's examples, all ranks; ``target_tokens`` those that are trained on.
        skipped: Whether the loss or the gradient was not finite, so that nothing was updated.
        coefficients_M: ``w``, the surgery's answer; None where there was none to give, and null in the record.
        gramian_MM: Raw Gramian of the per-task gradients, where rows were computed: gives the norms and cosines. A
            pair with a zero row has no cosine.
    """
    present = [names_T[task] for task in tasks]
    record: dict[str, Any] = {
        "step": step,
        "stage": stage,
        "loss": _by_name(present, losses_M),
        "objective": float(objective),
        "counts": {name: int(count) for name, count in zip(present, counts_M, strict=True)},
        "p": _by_name(names_T, probabilities_T),
        "a": _by_name(present, shares_M),
        "lambda": _by_name(names_T, weights_T),
        "w": None if coefficients_M is None else _by_name(present, coefficients_M),
        "grad_norm": float(grad_norm),
    }
    if gramian_MM is not None:
        # Rounding can leave the square of a tiny norm below zero.
        norms = [math.sqrt(max(float(gramian_MM[row][row]), 0.0)) for row in range(len(present))]
        record["grad_norm_task"] = dict(zip(present, norms, strict=True))
        record["cosines"] = {
            f"{present[i]}|{present[j]}": float(gramian_MM[i][j]) / (norms[i] * norms[j])
            for i, j in combinations(range(len(present)), 2)
            if norms[i] * norms[j] > 0
        }
    if skipped:
        record["skipped"] = True
    return record | {"learning_rate": float(learning_rate), "tokens": int(tokens), "target_tokens": int(target_tokens)}


def evaluation_record(
    evaluations: Mapping[str, TaskEvaluation], *, step: int, stage: str, base_losses: Mapping[str, float]
) -> dict[str, Any]:
    """One evaluation on validation data.

    ``mean`` holds only means that make sense: of every metric over the tasks that have it, ``score`` of the tasks' own
    metrics (all are in [0, 1], higher is better), and ``loss_ratio`` of loss / loss before training.

    Args:
        evaluations: The evaluated tasks, by name.
        base_losses: Their losses before training, on the same examples; a task without one is left out of the ratio.
    """
    values: dict[str, list[float]] = {}
    for name, evaluation in evaluations.items():
        for metric, score in evaluation.scores.items():
            values.setdefault(metric, []).append(score)
        if evaluation.metric is not None:
            values.setdefault("score", []).append(evaluation.scores[evaluation.metric])
        if base_losses.get(name, 0.0) > 0:
            values.setdefault("loss_ratio", []).append(evaluation.loss / base_losses[name])
    return {
        "step": step,
        "stage": stage,
        "eval": {name: scores_and_loss(evaluation) for name, evaluation in evaluations.items()},
        "mean": {key: math.fsum(items) / len(items) for key, items in values.items()},
    }


def scores_and_loss(evaluation: TaskEvaluation) -> dict[str, float]:
    """The numbers of one task's evaluation: its own metric, what else was scored, and ``loss``."""
    own = {} if evaluation.metric is None else {evaluation.metric: evaluation.scores[evaluation.metric]}
    return {**own, **evaluation.scores, "loss": float(evaluation.loss)}


def timing_record(
    *, step: int, stage: str, seconds: float, tokens_per_second: float, peak_memory_bytes: int | None
) -> dict[str, Any]:
    """What training cost up to this step: ``seconds`` and peak memory so far, and the speed of late."""
    return {
        "step": step,
        "stage": stage,
        "seconds": float(seconds),
        "tokens_per_second": float(tokens_per_second),
        "peak_memory_bytes": peak_memory_bytes,
    }


def _by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
