from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch

from mtl.evaluation.results import TaskEvaluation
from mtl.reporting.json_files import to_json
from mtl.reporting.records import (
    MANY_TASKS,
    MAX_COSINE_TASKS,
    cosine_summary,
    evaluation_record,
    scores_and_loss,
    step_record,
    summary,
    timing_record,
    worst,
)

STEP: dict[str, Any] = {
    "step": 7,
    "stage": "joint",
    "tasks": [0, 2],
    "counts_M": [3, 1],
    "losses_M": [2.0, 0.5],
    "shares_M": [0.75, 0.25],
    "probabilities_T": [0.5, 0.25, 0.25],
    "weights_T": [1.0, 1.5, 0.5],
    "objective": 1.5625,
    "grad_norm": 0.25,
    "learning_rate": 2e-4,
    "tokens": 400,
    "target_tokens": 40,
}
NAMES = ["a", "情 b", "c"]


def evaluation(loss: float, metric: str | None, scores: dict[str, float]) -> TaskEvaluation:
    return TaskEvaluation(loss, 10, 100, metric, scores, [])


def test_golden_step() -> None:
    expected = (
        '{"step": 7, "stage": "joint", "loss": {"a": 2.0, "c": 0.5}, "objective": 1.5625, "counts": {"a": 3, "c": 1}, '
        '"p": {"a": 0.5, "情 b": 0.25, "c": 0.25}, "a": {"a": 0.75, "c": 0.25}, '
        '"lambda": {"a": 1.0, "情 b": 1.5, "c": 0.5}, "w": null, "grad_norm": 0.25, '
        '"learning_rate": 0.0002, "tokens": 400, "target_tokens": 40}'
    )
    assert to_json(step_record(NAMES, **STEP)).decode() == expected


def test_rows_give_norms_and_cosines() -> None:
    record = step_record(NAMES, **STEP, coefficients_M=[0.5, 1.0], gramian_MM=[[4.0, -3.0], [-3.0, 9.0]])
    assert record["w"] == {"a": 0.5, "c": 1.0}
    assert record["grad_norm_task"] == {"a": 2.0, "c": 3.0}
    assert record["cosines"] == {"a|c": -0.5}


@pytest.mark.parametrize("square", [0.0, -1e-20])
def test_a_zero_row_has_a_norm_and_no_cosine(square: float) -> None:
    record = step_record(NAMES, **STEP, gramian_MM=[[4.0, 0.0], [0.0, square]])
    assert record["grad_norm_task"] == {"a": 2.0, "c": 0.0}
    assert record["cosines"] == {}


def many_rows(num_tasks: int) -> tuple[dict[str, Any], list[str], torch.Tensor]:
    """A step of so many tasks, their names, and the Gramian of their rows."""
    rows = torch.randn(num_tasks, 40, generator=torch.Generator().manual_seed(num_tasks), dtype=torch.float64)
    numbers = ("counts_M", "losses_M", "shares_M", "probabilities_T", "weights_T")
    step = STEP | {"tasks": list(range(num_tasks))} | {key: [1.0] * num_tasks for key in numbers}
    return step, [f"t{number}" for number in range(num_tasks)], rows @ rows.T


def all_cosines(names: list[str], gramian_MM: torch.Tensor) -> dict[str, float]:
    norms = [math.sqrt(square) for square in gramian_MM.diagonal().tolist()]
    return {
        f"{names[i]}|{names[j]}": float(gramian_MM[i][j]) / (norms[i] * norms[j])
        for i, j in combinations(range(len(names)), 2)
    }


@pytest.mark.parametrize("num_tasks", [1, 2, 8, MAX_COSINE_TASKS])
def test_few_tasks_have_all_cosines_bit_for_bit(num_tasks: int) -> None:
    step, names, gramian_MM = many_rows(num_tasks)
    record = step_record(names, **step, gramian_MM=gramian_MM.tolist())
    assert list(record["cosines"].items()) == list(all_cosines(names, gramian_MM).items())
    assert "cosine_summary" not in record
    assert record["grad_norm_task"] == {
        name: math.sqrt(square) for name, square in zip(names, gramian_MM.diagonal().tolist(), strict=True)
    }


def test_many_tasks_have_the_lowest_cosines_and_a_summary() -> None:
    step, names, gramian_MM = many_rows(64)
    record = step_record(names, **step, gramian_MM=gramian_MM.tolist())
    cosines = sorted(all_cosines(names, gramian_MM).items(), key=lambda item: item[1])
    assert list(record["cosines"].items()) == cosines[:32]
    values = [value for _, value in cosines]
    assert record["cosine_summary"] == pytest.approx(
        {
            "mean": sum(values) / 2_016,
            "min": values[0],
            "median": (values[1_007] + values[1_008]) / 2,
            "max": values[-1],
            "conflicting": sum(value < 0 for value in values) / 2_016,
        }
    )
    assert len(to_json({key: record[key] for key in ("cosines", "cosine_summary")})) < 2_000
    assert len(record["grad_norm_task"]) == 64


def test_many_rows_that_are_zero_or_not_finite_are_recorded() -> None:
    step, names, gramian_MM = many_rows(20)
    assert step_record(names, **step, gramian_MM=(0 * gramian_MM).tolist())["cosine_summary"] == {}
    for bad in (math.nan, math.inf):
        record = step_record(names, **step, gramian_MM=(bad * gramian_MM).tolist(), skipped=True)
        assert b'"skipped": true' in to_json(record)


def test_summaries() -> None:
    assert summary([3.0, 1.0, 2.0, 10.0]) == {"mean": 4.0, "min": 1.0, "median": 2.5, "max": 10.0}
    assert cosine_summary([-0.5, 0.0, 0.5, 0.5])["conflicting"] == 0.25
    assert summary([]) == cosine_summary([]) == {}


def test_worst_tasks_are_those_of_the_highest_ratio_and_what_diverged_before_all() -> None:
    ratios = {"a": 0.5, "b": 1.5, "c": math.nan, "d": 1.5, "e": 0.1}
    assert worst(ratios, 4) == ["c", "b", "d", "a"]
    assert worst(ratios, 9) == ["c", "b", "d", "a", "e"]


def test_a_step_without_rows_says_so() -> None:
    assert not {"grad_norm_task", "cosines"} & step_record(NAMES, **STEP).keys()


@pytest.mark.parametrize("key", ["losses_M", "counts_M", "shares_M", "probabilities_T", "weights_T"])
def test_numbers_of_the_wrong_length_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="zip"):
        step_record(NAMES, **STEP | {key: STEP[key][:-1]})


def test_evaluation_means_never_mix_units() -> None:
    evaluations = {
        "a": evaluation(1.0, "accuracy", {"macro_f1": 0.25, "accuracy": 0.5}),
        "b": evaluation(3.0, "bleu", {"bleu": 0.25}),
        "c": evaluation(0.5, None, {}),
    }
    record = evaluation_record(evaluations, step=3, stage="joint", base_losses={"a": 2.0, "b": 4.0, "c": 0.0})
    assert record == {
        "step": 3,
        "stage": "joint",
        "eval": {
            "a": {"accuracy": 0.5, "macro_f1": 0.25, "loss": 1.0},
            "b": {"bleu": 0.25, "loss": 3.0},
            "c": {"loss": 0.5},
        },
        "mean": {"accuracy": 0.5, "macro_f1": 0.25, "bleu": 0.25, "score": 0.375, "loss_ratio": 0.625},
    }


def test_many_evaluations_are_summarised_and_the_worst_named() -> None:
    names = [f"t{number}" for number in range(MANY_TASKS + 1)]
    evaluations = {
        name: evaluation(1.0 + number, "accuracy", {"accuracy": number / 64}) for number, name in enumerate(names)
    }
    record = evaluation_record(evaluations, step=3, stage="joint", base_losses=dict.fromkeys(names, 4.0))
    assert record["worst"] == {f"t{number}": (1 + number) / 4 for number in range(32, 22, -1)}
    assert record["summary"]["accuracy"] == {"mean": 0.25, "min": 0.0, "median": 0.25, "max": 0.5}
    assert record["summary"].keys() == record["mean"].keys() == {"accuracy", "score", "loss_ratio"}
    assert list(record["eval"]) == names
    few = evaluation_record(dict(list(evaluations.items())[1:]), step=3, stage="joint", base_losses={})
    assert few.keys() == {"step", "stage", "eval", "mean"}


def test_the_tasks_own_metric_comes_first() -> None:
    assert next(iter(scores_and_loss(evaluation(1.0, "accuracy", {"macro_f1": 0.25, "accuracy": 0.5})))) == "accuracy"


def test_evaluation_without_scores_or_base_has_no_mean() -> None:
    record = evaluation_record({"a": evaluation(math.nan, None, {})}, step=0, stage="s", base_losses={})
    assert record["mean"] == {}
    assert to_json(record) == b'{"step": 0, "stage": "s", "eval": {"a": {"loss": null}}, "mean": {}}'


def test_golden_timing() -> None:
    record = timing_record(step=1, stage="joint", seconds=2, tokens_per_second=210.5, peak_memory_bytes=None)
    expected = b'{"step": 1, "stage": "joint", "seconds": 2.0, "tokens_per_second": 210.5, "peak_memory_bytes": null}'
    assert to_json(record) == expected
