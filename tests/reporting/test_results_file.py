from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtl.errors import UserError
from mtl.evaluation.results import Prediction
from mtl.reporting.results import (
    Cost,
    Results,
    TaskResult,
    read_predictions,
    read_results,
    write_predictions,
    write_results,
)

TASK = TaskResult(
    metric="accuracy",
    base={"accuracy": 0.1 + 0.2, "loss": 2.5},
    val={"accuracy": 0.5, "loss": 1.5},
    test={"accuracy": 0.625, "loss": 1.25, "num_examples": 50},
    examples_seen=80,
    epochs_seen=4.0,
    target_tokens_seen=160,
)
TEXT = replace(TASK, metric=None, base={"loss": 2.0}, val={"loss": 2.0}, test={"loss": 1.0, "num_examples": 5})
RESULTS = Results(
    strategy={"sampler": "temperature", "surgery": None},
    seed=3,
    model="模型",
    tasks={"情感 😀": TASK, "text": TEXT},
    cost=Cost(10, 4000, 400, 12.5, 320.0, None),
)

GOLDEN = {
    "schema": 1,
    "strategy": {"sampler": "temperature", "surgery": None},
    "seed": 3,
    "model": "模型",
    "tasks": {
        "情感 😀": {
            "metric": "accuracy",
            "higher_is_better": True,
            "base": {"accuracy": 0.30000000000000004, "loss": 2.5},
            "val": {"accuracy": 0.5, "loss": 1.5},
            "test": {"accuracy": 0.625, "loss": 1.25, "num_examples": 50},
            "examples_seen": 80,
            "epochs_seen": 4.0,
            "target_tokens_seen": 160,
        },
        "text": {
            "metric": None,
            "higher_is_better": True,
            "base": {"loss": 2.0},
            "val": {"loss": 2.0},
            "test": {"loss": 1.0, "num_examples": 5},
            "examples_seen": 80,
            "epochs_seen": 4.0,
            "target_tokens_seen": 160,
        },
    },
    "cost": {
        "steps": 10,
        "tokens": 4000,
        "target_tokens": 400,
        "seconds": 12.5,
        "tokens_per_second": 320.0,
        "peak_memory_bytes": None,
    },
    "stages": [],
}


def test_golden_content_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, RESULTS)
    text = path.read_text(encoding="utf-8")
    assert text == json.dumps(GOLDEN, indent=2, ensure_ascii=False) + "\n"
    assert read_results(path) == RESULTS
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    diverged = replace(TASK, test={"accuracy": 0.0, "loss": math.nan, "num_examples": 50})
    write_results(path, replace(RESULTS, tasks={"a": diverged}, cost=replace(RESULTS.cost, tokens_per_second=math.inf)))
    assert "NaN" not in path.read_text()
    back = read_results(path)
    assert back.tasks["a"].test == {"accuracy": 0.0, "loss": None, "num_examples": 50}
    assert back.cost.tokens_per_second is None


def test_there_may_be_no_validation(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(GOLDEN | {"tasks": {"text": {**GOLDEN["tasks"]["text"], "val": {}}}}))  # type: ignore[index]
    assert read_results(path).tasks["text"].val == {}


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(GOLDEN | {"later": [1]}))
    assert read_results(path) == RESULTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be JSON in UTF-8, found: Expecting value: line 1"),
        (b'{"schema": 1,\n"se', "found: .* line 2"),
        (b'{"schema": NaN}', "found: NaN, which JSON does not have"),
        (b"\xff\xfe", "must be JSON in UTF-8"),
        (b"[]", "must be a JSON object, found list"),
        (b"{}", "schema must be an integer, found nothing"),
        (b'{"schema": 2}', "schema must be 1, found 2; read it with the mtl that wrote it"),
    ],
)
def test_damaged_files_are_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"results\.json: .*{message}") as raised:
        read_results(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["tasks"], [], r"tasks must be an object, found \[\]"),
        (["tasks", "text"], None, "tasks.text must be an object, found None"),
        (["tasks", "text", "test"], {}, "tasks.text.test.loss must be a number or null, found nothing"),
        (["tasks", "text", "test"], {"loss": 1.0}, "tasks.text.test.num_examples must be an integer, found nothing"),
        (["tasks", "text", "test", "loss"], "low", "tasks.text.test.loss must be a number or null, found 'low'"),
        (["tasks", "text", "metric"], "bleu", "tasks.text.base.bleu must be a number or null, found nothing"),
        (["tasks", "text", "examples_seen"], True, "tasks.text.examples_seen must be an integer, found True"),
        (["seed"], 1.5, "seed must be an integer, found 1.5"),
        (["cost", "seconds"], None, "cost.seconds must be a number, found None"),
    ],
)
def test_what_is_missing_or_wrong_is_named(keys: list[str], value: Any, message: str, tmp_path: Path) -> None:
    content = json.loads(json.dumps(GOLDEN))
    holder = content
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"results\.json: {message}; run the training again\."):
        read_results(path)


def test_a_score_that_is_better_if_low(tmp_path: Path) -> None:
    """It would be compared the wrong way round."""
    path = tmp_path / "results.json"
    tasks = {"text": GOLDEN["tasks"]["text"] | {"higher_is_better": False}}  # type: ignore[index]
    path.write_text(json.dumps(GOLDEN | {"tasks": tasks}))
    with pytest.raises(UserError, match=r"tasks\.text\.higher_is_better must be true of any score; store 1 - x, say\."):
        read_results(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_results(tmp_path / "results.json")
    with pytest.raises(UserError, match="directory"):
        read_results(tmp_path)


def test_predictions(tmp_path: Path) -> None:
    rows = [
        Prediction("问题\u2028?", "😀", "It is 😀.\n", "😀", 1.0, "test.jsonl:1", 2.5, 3, True),
        Prediction("p", "r", "", "", 0.0, "test.jsonl:2", 0.1, 1, False),
    ]
    write_predictions(tmp_path / "predictions", "情感 😀", rows)
    path = tmp_path / "predictions" / "情感 😀.jsonl"
    assert path.read_bytes().splitlines()[1] == (
        b'{"prompt": "p", "reference": "r", "prediction": "", "answer": "", "score": 0.0, "location": "test.jsonl:2", '
        b'"loss": 0.1, "num_targets": 1, "complete": false}'
    )
    assert read_predictions(path) == rows
    with pytest.raises(UserError, match="must be a file, and there is none"):
        read_predictions(tmp_path / "predictions" / "other.jsonl")


LEAST = {"prompt": "p", "reference": "r", "prediction": "x", "score": 0.5}


def test_predictions_by_others(tmp_path: Path) -> None:
    """What the contract names is enough."""
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(LEAST) + "\n")
    assert read_predictions(path) == [Prediction("p", "r", "x", "x", 0.5, "task.jsonl:1", None, 0, True)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompt", None, "prompt must be a text, found None"),
        ("answer", 3, "answer must be a text, found 3"),
        ("score", 31.5, r"score must be a number from 0 to 1, found 31\.5"),
        ("score", math.nan, "score must be a number from 0 to 1, found nan"),
        ("score", True, "score must be a number from 0 to 1, found True"),
        ("loss", "low", "loss must be a number or null, found 'low'"),
        ("num_targets", -1, "num_targets must be a number of tokens, found -1"),
        ("complete", 1, "complete must be true or false, found 1"),
    ],
)
def test_a_damaged_prediction_is_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(LEAST) + "\n" + json.dumps(LEAST | {key: value}) + "\n")
    with pytest.raises(UserError, match=rf"task\.jsonl:2: {message}; run the training again\."):
        read_predictions(path)


def test_a_prediction_that_lacks_something(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "p", "reference": "r"}\n')
    with pytest.raises(UserError, match=r":1: prediction must be a text, found nothing"):
        read_predictions(path)
