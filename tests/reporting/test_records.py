from __future__ import annotations

import math
from typing import Any

import pytest

from mtl.evaluation.results import TaskEvaluation
from mtl.reporting.json_files import to_json
from mtl.reporting.records import evaluation_record, scores_and_loss, step_record, timing_record

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
