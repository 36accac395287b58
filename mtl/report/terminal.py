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
OPTIONAL = ("GB", "minutes", "Mtokens", "seeds", "mean\nrank")  # left out one by one where the console is narrow
NOTHING = "-"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Prints the findings in words, a table of strategies, one of tasks, failures and notes.

    Of many strategies it shows the best, and of their numbers what is as wide as the console.
    """
    for sentence in sentences(comparison):
        console.print(Text(f"* {sentence}"))
    console.print()
    console.print(_strategies(comparison, console))
    _print_hidden(console, len(comparison.strategies) - MAX_STRATEGIES, "summary.csv")
    console.print()
    table, num_shown = _tasks(comparison, console)
    console.print(table)
    _print_hidden(console, len(comparison.strategies) - num_shown, "tasks.csv")
    for name, error in comparison.failures.items():
        console.print(Text(f"failed: {name}: {error}", style="red"))
    for note in comparison.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _print_hidden(console: Console, number_hidden: int, file: str) -> None:
    if number_hidden > 0:
        console.print(f"and {number_hidden} more strategies, which the page and {file} have", style="dim")


def _strategies(comparison: Comparison, console: Console) -> Table:
    rows = [_strategy_cells(item, comparison) for item in comparison.strategies[:MAX_STRATEGIES]]
    kind = f"change against {comparison.reference_name}" if comparison.reference_name else "test score"
    for num_left_out in range(len(OPTIONAL) + 1):
        table = _table(f"{kind}: mean with 95 % interval, worst task; bold: none is better in both")
        headings = [heading for heading in rows[0] if heading not in OPTIONAL[:num_left_out]]
        for heading in headings:
            text = heading in ("strategy", "")
            table.add_column(heading, justify="left" if text else "right", no_wrap=not text, overflow="fold")
        for cells in rows:
            table.add_row(*(cells[heading] for heading in headings))
        if _fits(table, console):
            break
    return table


def _strategy_cells(item: StrategyOutcome, comparison: Comparison) -> dict[str, Text]:
    bound = f"[{number(item.mean.low, comparison)}, {number(item.mean.high, comparison)}]"
    memory = item.cost.peak_memory_bytes
    cells = {
        "strategy": item.name,
        "mean": number(item.mean.value, comparison),
        "[95 %]": NOTHING if isnan(item.mean.low) else bound,
        "worst task": number(item.worst.value, comparison),
        "": item.worst_task,
        "hurt": str(item.num_hurt) if comparison.reference_name else NOTHING,
        "mean\nrank": NOTHING if isnan(item.mean_rank) else f"{item.mean_rank:.2f}",
        "seeds": str(len(item.runs)),
        "Mtokens": f"{item.cost.tokens / 1e6:.3g}",
        "minutes": f"{item.cost.seconds / 60:.1f}",
        "GB": NOTHING if memory is None else f"{memory / 1e9:.2f}",
    }
    bold = "bold" if item.on_pareto_front else ""
    return {heading: Text(cell, style=bold if heading == "strategy" else "") for heading, cell in cells.items()}


def _tasks(comparison: Comparison, console: Console) -> tuple[Table, int]:
    """With as many strategies as there is room for, and how many these are."""
    for num_shown in range(min(MAX_COLUMNS, len(comparison.strategies)), 0, -1):
        shown = comparison.strategies[:num_shown]
        table = _table("test score; < or >: the 95 % interval is below or above the reference")
        for heading in ("task", "metric"):
            table.add_column(heading, overflow="fold", max_width=24)
        numbers = ["before", *([comparison.reference_name] if comparison.reference_name else [])]
        for name in (*numbers, *(item.name for item in shown)):
            table.add_column(Text(name), justify="right", overflow="fold", max_width=14)
        for name in comparison.tasks:
            cells = [name, comparison.metrics[name], _number(comparison.base[name])]
            if comparison.reference_name:
                cells.append(_number(comparison.reference[name]))
            table.add_row(*map(Text, cells), *(_score(item.tasks[name]) for item in shown))
        if _fits(table, console):
            break
    return table, num_shown


def _fits(table: Table, console: Console) -> bool:
    unlimited = console.options.update(max_width=10_000)
    return console.measure(table, options=unlimited).maximum <= console.width


def _score(task: TaskOutcome) -> Text:
    mark, style = " ", ""
    if task.hurt:
        mark, style = "<", "red"
    elif task.change is not None and task.change.low > 0:
        mark, style = ">", "green"
    return Text(f"{_number(task.score.value)}{mark}", style=style)


def _table(title: str) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title=title, title_justify="left")


def _number(value: float) -> str:
    return NOTHING if isnan(value) else f"{value:.3f}"
