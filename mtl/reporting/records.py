"""The records of a run as plain dicts: lines of ``metrics.jsonl`` and ``timings.jsonl``.

Shape suffixes: T tasks of the stage, M tasks present in the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mtl.evaluation.results import TaskEvaluation

MANY_TASKS = 32  # beyond it nobody reads curves or lines of every task; what is shown then are extremes and means
NUM_WORST = 10
MAX_COSINE_TASKS = 16  # 120 pairs are 5 kB of a line; 64 tasks have 2,016 pairs, and 90 kB
NUM_CONFLICTS = 32


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
    signals: Mapping[str, Sequence[float | None]] | None = None,
    conflict: tuple[Sequence[str], Sequence[Sequence[float]]] | None = None,
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
        gramian_MM: Raw Gramian of the tasks' gradients, where rows were computed: gives norms and cosines (none with a
            zero row). Of over 16 tasks ``cosines`` has the 32 lowest only, and ``cosine_summary`` describes all.
        signals: What the sampler's probabilities go by, by name, for each of ``names_T``; null where not known yet.
        conflict: Names of K tasks and their cosines between two halves of the step [K, K].
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
        record |= _norms_and_cosines(present, np.asarray(gramian_MM, dtype=np.float64))
    if signals:
        record["signal"] = {key: dict(zip(names_T, values, strict=True)) for key, values in signals.items()}
    if conflict:
        record["conflict"] = {"tasks": list(conflict[0]), "cosines": list(map(list, conflict[1]))}
    if skipped:
        record["skipped"] = True
    return record | {"learning_rate": float(learning_rate), "tokens": int(tokens), "target_tokens": int(target_tokens)}


def cosine_summary(cosines: Sequence[float]) -> dict[str, float]:
    """:func:`summary` of the cosines of all pairs, and the share of the pairs that are in conflict (below 0)."""
    if not cosines:
        return {}
    return summary(cosines) | {"conflicting": sum(cosine < 0 for cosine in cosines) / len(cosines)}


def summary(values: Sequence[float]) -> dict[str, float]:
    """What is left of many values where there is no room for each: mean, least, median and largest."""
    if not values:
        return {}
    return {
        "mean": math.fsum(values) / len(values),
        "min": min(values),
        "median": median(values),
        "max": max(values),
    }


def evaluation_record(
    evaluations: Mapping[str, TaskEvaluation], *, step: int, stage: str, base_losses: Mapping[str, float]
) -> dict[str, Any]:
    """One evaluation on validation data.

    ``mean`` holds only means that make sense: of every metric over the tasks that have it, ``score`` of the tasks' own
    metrics (all are in [0, 1], higher is better), and ``loss_ratio`` of loss / loss before training. Of more than 32
    tasks, ``summary`` describes what the means are of, and ``worst`` names the 10 tasks of the highest ratio, highest
    first.

    Args:
        evaluations: The evaluated tasks, by name.
        base_losses: Their losses before training, on the same examples; a task without one is left out of the ratio.
    """
    values: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    for name, evaluation in evaluations.items():
        for metric, score in evaluation.scores.items():
            values.setdefault(metric, []).append(score)
        if evaluation.metric is not None:
            values.setdefault("score", []).append(evaluation.scores[evaluation.metric])
        if base_losses.get(name, 0.0) > 0:
            ratios[name] = evaluation.loss / base_losses[name]
            values.setdefault("loss_ratio", []).append(ratios[name])
    record: dict[str, Any] = {
        "step": step,
        "stage": stage,
        "eval": {name: scores_and_loss(evaluation) for name, evaluation in evaluations.items()},
        "mean": {key: math.fsum(items) / len(items) for key, items in values.items()},
    }
    if len(evaluations) > MANY_TASKS:
        record["summary"] = {key: summary(items) for key, items in values.items()}
        record["worst"] = {name: ratios[name] for name in worst(ratios, NUM_WORST)}
    return record


def worst(loss_ratios: Mapping[str, float], number: int) -> list[str]:
    """The tasks of the highest loss over that before training, highest first, those that diverged before all."""
    finite = {name: ratio if math.isfinite(ratio) else math.inf for name, ratio in loss_ratios.items()}
    return sorted(finite, key=finite.__getitem__, reverse=True)[:number]


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


def _norms_and_cosines(names_M: Sequence[str], gramian_MM: NDArray[np.float64]) -> dict[str, Any]:
    # Rounding can leave the square of a tiny norm below zero.
    norms_M = np.sqrt(np.maximum(gramian_MM.diagonal(), 0.0))
    first, second = np.triu_indices(len(names_M), k=1)
    with np.errstate(over="ignore", invalid="ignore"):  # a step that is not finite is recorded too
        products = norms_M[first] * norms_M[second]
        kept = products > 0
        first, second = first[kept], second[kept]
        cosines = gramian_MM[first, second] / products[kept]
    record: dict[str, Any] = {"grad_norm_task": dict(zip(names_M, norms_M.tolist(), strict=True))}
    if len(names_M) > MAX_COSINE_TASKS:
        record["cosine_summary"] = cosine_summary(cosines.tolist())
        lowest = np.argsort(cosines, kind="stable")[:NUM_CONFLICTS]
        first, second, cosines = first[lowest], second[lowest], cosines[lowest]
    pairs = [f"{names_M[i]}|{names_M[j]}" for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    return record | {"cosines": dict(zip(pairs, cosines.tolist(), strict=True))}
