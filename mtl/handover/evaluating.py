"""``mtl eval``: what is deployed, evaluated on the run's data by the run's code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtl.data.loading import load_tasks
from mtl.evaluation.evaluate import Progress, evaluate
from mtl.evaluation.results import TaskEvaluation
from mtl.handover.deployment import Deployment
from mtl.handover.loading import LoadedModel
from mtl.reporting.json_files import to_json, write_atomically

SCHEMA = 1


def evaluate_tasks(
    loaded: LoadedModel, names: list[str], split: str, max_examples: int | None, progress: Progress | None
) -> dict[str, TaskEvaluation]:
    """Evaluates tasks, each with its own adapter, as the run did when it was finished.

    Args:
        loaded: The model.
        names: Of the tasks.
        split: ``val`` or ``test``.
        max_examples: Of each task; as many as in the run if not given.
        progress: As in :func:`mtl.evaluation.evaluate.evaluate`.

    Raises:
        UserError: Data are missing or broken.
    """
    deployment = loaded.deployment
    options = deployment.options
    data = load_tasks(
        [deployment.tasks[name].task for name in names],
        loaded.tokenizer,
        max_length=options.max_length,
        seed=options.seed,
        cache_dir=deployment.cache_dir,
        too_long=options.too_long,
    )
    of_run = options.max_test_examples if split == "test" else options.max_eval_examples

    @contextmanager
    def activate(index: int | None) -> Iterator[None]:
        assert index is not None
        with loaded.task(names[index]):
            yield

    evaluations = evaluate(
        loaded.model,
        loaded.tokenizer,
        activate,
        data,
        split=split,
        max_examples=of_run if max_examples is None else max_examples,
        predict=True,
        distributed=loaded.distributed,
        token_budget=options.eval_micro_batch_tokens,
        progress=progress,
    )
    return dict(zip(names, evaluations, strict=True))


def scores_of(evaluation: TaskEvaluation) -> dict[str, float]:
    """What ``results.json`` says of a task's test examples."""
    return {**evaluation.scores, "loss": evaluation.loss, "num_examples": evaluation.num_examples}


def write_scores(path: Path, deployment: Deployment, split: str, found: Mapping[str, TaskEvaluation]) -> None:
    """Writes the scores as JSON."""
    content = {
        "schema": SCHEMA,
        "source": str(deployment.folder),
        "format": deployment.format,
        "split": split,
        "tasks": {name: {"metric": item.metric, **scores_of(item)} for name, item in found.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(content, indent=2) + b"\n")


def print_scores(console: Console, deployment: Deployment, split: str, found: Mapping[str, TaskEvaluation]) -> None:
    """Prints a table, on test data beside the scores of the run, and whether they are the same."""
    compared = split == "test"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("task", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("score", "loss", "examples", *(("score\nin the run", "loss\nin the run") if compared else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, item in found.items():
        cells = [name, item.metric or "-", _number(item.score), _number(item.loss), f"{item.num_examples:,}"]
        if compared:
            test = deployment.tasks[name].test
            cells += [_number(test.get(item.metric) if item.metric else None), _number(test.get("loss"))]
        table.add_row(*map(Text, cells))
    console.print(table)
    if compared:
        console.print(_verdict(deployment, found), style="dim")


def _verdict(deployment: Deployment, found: Mapping[str, TaskEvaluation]) -> str:
    """Compares with the run on the tasks that it evaluated on as many examples."""
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [
        (scores_of(item), deployment.tasks[name].test) for name, item in found.items()
    ]
    alike = [(own, run) for own, run in pairs if own["num_examples"] == run.get("num_examples")]
    if not alike:
        return "of other examples than the run's"
    largest = max(_largest(own, run) for own, run in alike)
    return "exactly as in the run's results.json" if largest == 0 else f"within {largest:.1e} of the run's results.json"


def _largest(own: Mapping[str, Any], run: Mapping[str, Any]) -> float:
    values = [(own[key], run.get(key)) for key in own]
    return max(0.0 if a == b else (math.inf if b is None else abs(a - b)) for a, b in values)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
