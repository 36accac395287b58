"""The comparison in the terminal: what is found in words, a line a strategy, a line a task."""

from __future__ import annotations

from math import isnan

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtl.report.comparison import Comparison, StrategyOutcome, TaskOutcome
from mtl.report.words import number, sentences

MAX_STRATEGIES = 30
MAX_COLUMNS = 8  # strategies side by side in the table of tasks
NOTHING = "-"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Prints all of it; of many strategies the best."""
    for sentence in sentences(comparison):
        console.print(Text(f"* {sentence}"))
    console.print()
    console.print(_strategies(comparison))
    hidden = len(comparison.strategies) - MAX_STRATEGIES
    if hidden > 0:
        console.print(f"and {hidden} more, which the page and summary.csv have", style="dim")
    console.print()
    console.print(_tasks(comparison))
    for name, error in comparison.failures.items():
        console.print(Text(f"failed: {name}: {error}", style="red"))
    for note in comparison.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _strategies(comparison: Comparison) -> Table:
    kind = f"change against {comparison.reference_name}" if comparison.reference_name else "test score"
    table = _table(f"{kind}, mean and worst task with 95 % intervals")
    table.add_column("strategy", overflow="fold")
    headings = ["mean", "[95 %]", "worst task", "", "hurt", "mean\nrank", "seeds", "Mtokens", "minutes", "GB"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for item in comparison.strategies[:MAX_STRATEGIES]:
        table.add_row(*_strategy_cells(item, comparison))
    return table


def _strategy_cells(item: StrategyOutcome, comparison: Comparison) -> list[Text]:
    bound = f"[{number(item.mean.low, comparison)}, {number(item.mean.high, comparison)}]"
    memory = item.cost.peak_memory_bytes
    cells = [
        item.name,
        number(item.mean.value, comparison),
        NOTHING if isnan(item.mean.low) else bound,
        number(item.worst.value, comparison),
        item.worst_task,
        str(item.num_hurt) if comparison.reference_name else NOTHING,
        f"{item.mean_rank:.2f}",
        str(len(item.runs)),
        f"{item.cost.tokens / 1e6:.3g}",
        f"{item.cost.seconds / 60:.1f}",
        NOTHING if memory is None else f"{memory / 1e9:.2f}",
    ]
    return [Text(cells[0], style="bold" if item.on_pareto_front else ""), *map(Text, cells[1:])]


def _tasks(comparison: Comparison) -> Table:
    table = _table("test score; < or >: surely worse or better than the reference")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    table.add_column("before", justify="right")
    if comparison.reference_name:
        table.add_column(comparison.reference_name, justify="right")
    shown = comparison.strategies[:MAX_COLUMNS]
    for item in shown:
        table.add_column(item.name, justify="right", overflow="fold")
    for name in comparison.tasks:
        cells = [name, comparison.metrics[name], _number(comparison.base[name])]
        if comparison.reference_name:
            cells.append(_number(comparison.reference[name]))
        table.add_row(*map(Text, cells), *(_score(item.tasks[name]) for item in shown))
    return table


def _score(task: TaskOutcome) -> Text:
    mark, style = " ", ""
    if task.change is not None and task.change.high < 0:
        mark, style = "<", "red"
    elif task.change is not None and task.change.low > 0:
        mark, style = ">", "green"
    return Text(f"{_number(task.score.value)}{mark}", style=style)


def _table(title: str) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title=title, title_justify="left")


def _number(value: float) -> str:
    return NOTHING if isnan(value) else f"{value:.3f}"
