"""The end of a run in the terminal: what became of every task, and where to look next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtl.reporting.records import MANY_TASKS, worst
from mtl.reporting.results import Results, TaskResult

WIDE = 100  # columns, from which on a metric's name keeps to one line
NO_NUMBER = "-"


def print_summary(
    console: Console,
    results: Results,
    chance: Mapping[str, float | None],
    output_dir: Path,
    shown: Path | None = None,
) -> None:
    """Prints the table of tasks and the lines below it; of more than 32 tasks those that have gained least.

    Args:
        results: Test scores and losses, before (``base``) and after (``test``).
        chance: What knowing nothing scores on each task: always the commonest answer, or a guess among the options.
        output_dir: The run's folder, with what it holds by now.
        shown: Where it will be, if that is another place.
    """
    tasks = _shown(results.tasks)
    console.print(_table(tasks, chance, narrow=console.width < WIDE))
    if len(tasks) < len(results.tasks):
        console.print(
            f"the {len(tasks)} of {len(results.tasks):,} tasks with the highest loss after / before; results.json has "
            "all",
            style="dim",
        )
    console.print("test data; chance: always the commonest answer, or a guess among the options", style="dim")
    console.print(_verdict(results))
    console.print("\nWhere to look next")
    for label, place in _places(results, output_dir, shown or output_dir):
        console.print(f"  {label:<12}{place}", soft_wrap=True)


def _shown(tasks: Mapping[str, TaskResult]) -> Mapping[str, TaskResult]:
    if len(tasks) <= MANY_TASKS:
        return tasks
    losses = {name: (task.test["loss"], task.base["loss"]) for name, task in tasks.items()}
    ratios = {name: after / before for name, (after, before) in losses.items() if after is not None and before}
    return {name: tasks[name] for name in worst(ratios, MANY_TASKS)}


def _table(tasks: Mapping[str, TaskResult], chance: Mapping[str, float | None], *, narrow: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in (
        "chance",
        "before",
        "after",
        "change",
        "loss\nbefore",
        "loss\nafter",
        "examples\nseen",
        "epochs\nseen",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, task in tasks.items():
        before, after = _score(task, task.base), _score(task, task.test)
        loss_before, loss_after = task.base["loss"], task.test["loss"]
        metric = task.metric or NO_NUMBER
        table.add_row(
            Text(name),
            Text(metric.replace("_", "\n") if narrow else metric),
            _number(chance.get(name)),
            _number(before),
            _number(after),
            _change(before, after),
            _number(loss_before),
            Text(_number(loss_after), style=_style(loss_after, loss_before)),
            f"{task.examples_seen:,}",
            f"{task.epochs_seen:.2f}",
        )
    return table


def _verdict(results: Results) -> str:
    tasks = results.tasks.values()
    scores = [(_score(task, task.base), _score(task, task.test)) for task in tasks if task.metric is not None]
    losses = [(task.test["loss"], task.base["loss"]) for task in tasks]
    lower = f"test loss lower on {_num_ascending(losses)} of {len(losses)} tasks"
    return f"{lower}, score higher on {_num_ascending(scores)} of {len(scores)}" if scores else lower


def _places(results: Results, output_dir: Path, shown: Path) -> list[tuple[str, str]]:
    places = [
        ("results", str(shown / "results.json")),
        ("predictions", str(shown / "predictions")),
        ("charts", f"tensorboard --logdir {shlex.quote(str(shown / 'tensorboard'))}"),
    ]
    if (output_dir / "model").is_dir():
        places.append(("model", f"AutoModelForCausalLM.from_pretrained({str(shown / 'model')!r})"))
    for name in results.tasks:
        if (output_dir / "adapters" / name).is_dir():
            places.append(("adapter", f"PeftModel.from_pretrained(base_model, {str(shown / 'adapters' / name)!r})"))
            break  # one shows how; the others lie beside it
    return places


def _score(task: TaskResult, scores: Mapping[str, float | None]) -> float | None:
    return None if task.metric is None else scores[task.metric]


def _number(value: float | None) -> str:
    return NO_NUMBER if value is None else f"{value:.3f}"


def _change(before: float | None, after: float | None) -> Text:
    if before is None or after is None:
        return Text(NO_NUMBER)
    shown = f"{after - before:+.3f}"
    return Text("0.000" if float(shown) == 0 else shown, style=_style(before, after))


def _style(low: float | None, high: float | None) -> str:
    """Green where ``high`` is the higher one, red where it is the lower one."""
    if low is None or high is None or low == high:
        return ""
    return "green" if high > low else "red"


def _num_ascending(pairs: list[tuple[float | None, float | None]]) -> int:
    return sum(low is not None and high is not None and low < high for low, high in pairs)
