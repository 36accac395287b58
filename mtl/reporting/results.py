"""``results.json`` and the predictions: what a finished run says about every task."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mtl.errors import UserError
from mtl.reporting.json_files import read_json_lines, to_json, write_atomically

if TYPE_CHECKING:
    from mtl.evaluation.results import Prediction

SCHEMA = 1

TASK_KINDS = {
    "metric": "a text or null",
    "base": "an object",
    "val": "an object",
    "test": "an object",
    "examples_seen": "an integer",
    "epochs_seen": "a number",
    "target_tokens_seen": "an integer",
}
_TEXT = ("a text", lambda value: isinstance(value, str))
PREDICTION_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("prompt", "reference", "prediction", "answer"), _TEXT),
    "score": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "location": _TEXT,
    "loss": ("a number or null", lambda value: value is None or _is_number(value)),
    "num_targets": ("a number of tokens", lambda value: isinstance(value, int) and value >= 0),
    "complete": ("true or false", lambda value: isinstance(value, bool)),
}
COST_KINDS = {
    "steps": "an integer",
    "tokens": "an integer",
    "target_tokens": "an integer",
    "seconds": "a number",
    "tokens_per_second": "a number or null",
    "peak_memory_bytes": "an integer or null",
}


@dataclass(frozen=True)
class TaskResult:
    """What the run did to one task.

    Args:
        metric: The task's own metric, in [0, 1]; None where there is only a loss.
        base: Scores and ``loss`` [nats per target token] of the model before training, on the test examples.
        val: The same of the trained model on the validation examples.
        test: The same of the trained model on the test examples, and ``num_examples``.
        examples_seen: Training examples seen, repetitions counted.
        epochs_seen: ``examples_seen`` over the size of the training set.
        target_tokens_seen: Target tokens trained on, repetitions counted.
    """

    metric: str | None
    base: Mapping[str, float | None]
    val: Mapping[str, float | None]
    test: Mapping[str, float | None]
    examples_seen: int
    epochs_seen: float
    target_tokens_seen: int


@dataclass(frozen=True)
class Cost:
    """What training took, over all stages; ``target_tokens`` are those of ``tokens`` that were trained on."""

    steps: int
    tokens: int
    target_tokens: int
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Results:
    """All of ``results.json``.

    ``strategy`` names the levers that were on, ``tasks`` is by the tasks' names, ``stages`` says of each stage which
    tasks it was for and why, and what became of it.
    """

    strategy: Mapping[str, Any]
    seed: int
    model: str
    tasks: Mapping[str, TaskResult]
    cost: Cost
    stages: Sequence[Mapping[str, Any]] = ()


def write_results(path: Path, results: Results) -> None:
    """Writes ``results.json``, whole or not at all. A number that is not finite is written as null."""
    tasks = {name: _task_json(task) for name, task in results.tasks.items()}
    content = {
        "schema": SCHEMA,
        "strategy": results.strategy,
        "seed": results.seed,
        "model": results.model,
        "tasks": tasks,
        "cost": asdict(results.cost),
        "stages": list(results.stages),
    }
    write_atomically(path, to_json(content, indent=2) + b"\n")


def read_results(path: Path) -> Results:
    """Reads a ``results.json``. Keys that it does not know are ignored.

    Raises:
        UserError: If the file is missing, damaged, of another schema, or lacks something.
    """
    results = _load(path)
    schema = results.pick({"schema": "an integer"})["schema"]
    if schema != SCHEMA:
        raise UserError(f"{path}: schema must be {SCHEMA}, found {schema}; read it with the mtl that wrote it.")
    tasks = results.object("tasks")
    return Results(
        **results.pick({"strategy": "an object", "seed": "an integer", "model": "a text"}),
        tasks={name: _read_task(tasks.object(name)) for name in tasks.content},
        cost=Cost(**results.object("cost").pick(COST_KINDS)),
        stages=tuple(results.pick({"stages": "a list"})["stages"]) if "stages" in results.content else (),
    )


def write_predictions(folder: Path, task: str, predictions: Iterable[Prediction]) -> None:
    """Writes ``<folder>/<task>.jsonl``, one test example a line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [to_json(asdict(prediction)) for prediction in predictions]
    write_atomically(folder / f"{task}.jsonl", b"".join(line + b"\n" for line in lines))


def read_predictions(path: Path) -> list[Prediction]:
    """Reads what :func:`write_predictions` has written, or others: prompt, reference, prediction and score are enough.

    The answer is then the prediction, and the loss, over 0 target tokens, is not known.

    Raises:
        UserError: If the file is missing, or a line lacks something or is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: must be a file, and there is none; run the training again.")
    return [_prediction(path, number, record) for number, record in enumerate(read_json_lines(path), start=1)]


def _prediction(path: Path, number: int, record: Mapping[str, Any]) -> Prediction:
    from mtl.evaluation.results import Prediction

    values = record
    if not record.keys() >= PREDICTION_KINDS.keys():
        place = f"{path.name}:{number}"
        unsaid = {"answer": record.get("prediction"), "location": place, "loss": None, "num_targets": 0}
        values = {**unsaid, "complete": True, **record}
    for key, (kind, is_right) in PREDICTION_KINDS.items():
        if not is_right(values.get(key)):
            found = repr(values[key])[:60] if key in values else "nothing"
            raise UserError(f"{path}:{number}: {key} must be {kind}, found {found}; run the training again.")
    return Prediction(**{key: values[key] for key in PREDICTION_KINDS})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)  # which is an int to Python


def _task_json(task: TaskResult) -> dict[str, Any]:
    content = asdict(task)
    return {"metric": content.pop("metric"), "higher_is_better": True, **content}


class _Object:
    """A JSON object of the file, which knows its place for the error messages."""

    kinds = MappingProxyType(
        {
            "an object": dict,
            "a list": list,
            "a text": str,
            "a text or null": str | None,
            "an integer": int,
            "an integer or null": int | None,
            "a number": int | float,
            "a number or null": int | float | None,
        }
    )

    def __init__(self, path: Path, content: dict[str, Any], place: str = "") -> None:
        self.path = path
        self.content = content
        self.place = place

    def pick(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        """The values of these keys; each must be there and of its kind."""
        for key, kind in kinds.items():
            value = self.content.get(key)
            # bool is an int to Python, but no number to anyone else.
            if key not in self.content or isinstance(value, bool) or not isinstance(value, self.kinds[kind]):
                found = repr(value)[:60] if key in self.content else "nothing"
                raise UserError(
                    f"{self.path}: {self.place}{key} must be {kind}, found {found}; run the training again."
                )
        return {key: self.content[key] for key in kinds}

    def object(self, key: str) -> _Object:
        return _Object(self.path, self.pick({key: "an object"})[key], f"{self.place}{key}.")


def _load(path: Path) -> _Object:
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path}: must be a readable file, found: {error.strerror}; name a finished run.") from None
    except ValueError as error:
        raise UserError(f"{path}: must be JSON in UTF-8, found: {error}; run the training again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, found {type(content).__name__}; run the training again.")
    return _Object(path, content)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant}, which JSON does not have")


def _read_task(task: _Object) -> TaskResult:
    values = task.pick(TASK_KINDS)
    for split in ("base", "val", "test"):
        # The validation of a run may be of losses only, and of what others wrote there may be none.
        needed = set() if split == "val" else {"loss", values["metric"] or "loss"}
        task.object(split).pick(dict.fromkeys({*values[split], *needed}, "a number or null"))
    task.object("test").pick({"num_examples": "an integer"})
    if task.content.get("higher_is_better", True) is not True:
        raise UserError(f"{task.path}: {task.place}higher_is_better must be true of any score; store 1 - x, say.")
    return TaskResult(**values)
