"""How charts look and how they are saved: figures of their own, without a window or pyplot's global state."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mtl.report.comparison import Comparison, Interval, StrategyOutcome, TaskOutcome
from mtl.reporting.records import MANY_TASKS

WIDTH = 7.5  # inches; 720 pixels of a page
COLUMNS = 3
MAX_STRATEGIES = 12  # that lines can tell apart: six colours, drawn through and dashed
NUM_LOWEST, NUM_HIGHEST = 8, 4  # of many tasks
MAX_LABEL = 26

# Okabe and Ito's colours that stand out on white, for readers with any colour vision.
BLUE, RED, GREEN, PINK, ORANGE, SKY = COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (3.5, 1.2)))
MARKERS = "os^DvPX<>pH*"
INK, GREY, PALE = "#222222", "#757575", "#e4e4e4"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # a task may be called $x$
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    # Text as text: a third of the size, found by a search, and in fonts that have its script.
    "svg.fonttype": "none",
    "svg.hashsalt": "mtl",
}
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Drawing:
    """A figure, its title, and how to read it in a sentence or two."""

    figure: Figure
    title: str
    caption: str


@dataclass(frozen=True)
class Chart:
    """A saved drawing; ``svg`` is an element to stand in a page."""

    name: str
    title: str
    caption: str
    svg: str


@contextmanager
def charts_style() -> Iterator[None]:
    """The look of all charts, whatever the user's own settings; without complaints about scripts that the font of the
    PNG files lacks, since SVG leaves fonts to the reader's program."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        warnings.filterwarnings("ignore", r"Matplotlib currently does not support \w+ natively", UserWarning)
        yield


def save(name: str, drawing: Drawing, folder: Path) -> Chart:
    """Writes ``<name>.svg`` and ``<name>.png``; equal drawings give equal bytes."""
    text = io.StringIO()
    drawing.figure.savefig(text, format="svg", metadata=NO_METADATA)
    svg = text.getvalue()
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    drawing.figure.savefig(folder / f"{name}.png", dpi=144, metadata={"Software": None})
    # The ids of groups are the same in every figure, and nothing refers to them.
    element = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    return Chart(name, drawing.title, drawing.caption, element)


def shown_strategies(comparison: Comparison) -> list[StrategyOutcome]:
    """At most 12: the best by their mean, the one with the best worst task among them."""
    strategies = list(comparison.strategies)
    best = max(strategies, key=lambda item: item.worst.value)
    shown = strategies[:MAX_STRATEGIES]
    return shown if best in shown else [*shown[:-1], best]


def shown_tasks(comparison: Comparison) -> list[str]:
    """All up to 32; else those in which the strategy with the best mean is lowest and highest."""
    if len(comparison.tasks) <= MANY_TASKS:
        return list(comparison.tasks)
    best = comparison.strategies[0]
    ranked = sorted(comparison.tasks, key=lambda name: compared_value(best.tasks[name]).value)
    extremes = {*ranked[:NUM_LOWEST], *ranked[-NUM_HIGHEST:]}
    return [name for name in comparison.tasks if name in extremes]


def what_is_shown(comparison: Comparison) -> str:
    """A sentence on what charts leave out; empty where that is nothing."""
    strategies, tasks = len(comparison.strategies), len(comparison.tasks)
    parts = []
    if strategies > MAX_STRATEGIES:
        parts.append(f"the {MAX_STRATEGIES} best of {strategies} strategies")
    if tasks > MANY_TASKS:
        parts.append(f"the {NUM_LOWEST} lowest and {NUM_HIGHEST} highest of {tasks:,} tasks by the best strategy")
    return f" Shown: {' and '.join(parts)}; the CSV files have all." if parts else ""


def compared_value(outcome: TaskOutcome) -> Interval:
    """The relative change against the reference, or the score where there is none."""
    return outcome.score if outcome.change is None else outcome.change


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the strategy or task that is shown at this place."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def marker_style(index: int) -> dict[str, Any]:
    """Colour and form of its points."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": ""}


def shortened(name: str) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 1]}…"


def label_width(names: Sequence[str]) -> float:
    """About the room that the longest of these names takes [inches]."""
    return 0.07 * max(
        (sum(2 if ord(letter) > 0x2E7F else 1 for letter in shortened(name)) for name in names), default=0
    )


def panels(
    count: int,
    *,
    columns: int = COLUMNS,
    height: float,
    left: float,
    right: float = 0.12,
    gap: float = 0.4,
    head: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A figure of panels row by row, laid out in inches.

    Args:
        count: Panels.
        columns: Most panels in a row.
        height: Of a panel's axes.
        left: Room for labels left of the first column.
        right: Room right of the last.
        gap: Room between columns.
        head: Room above all, for a legend.
    """
    title, foot = 0.3, 0.34
    rows, columns = ceil(count / columns), min(columns, count)
    width = (WIDTH - left - right - gap * (columns - 1)) / columns
    total = head + rows * (title + height + foot)
    figure = Figure(figsize=(WIDTH, total))
    axes = []
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + column * (width + gap), total - head - row * (title + height + foot) - title - height
        axes.append(figure.add_axes((x / WIDTH, y / total, width / WIDTH, height / total)))
    return figure, axes


def few_ticks(axes: Axes, which: str = "both") -> None:
    """As many ticks as a small panel can label."""
    for axis in (axes.xaxis,) if which == "x" else (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))


def legend_head(names: Sequence[str]) -> float:
    """Room for :func:`add_legend` [inches]."""
    return 0.05 + 0.165 * ceil(len(names) / _legend_columns(names))


def add_legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """One legend for all panels, above them."""
    figure.legend(
        list(handles),
        [shortened(name) for name in names],
        loc="upper left",
        ncols=_legend_columns(names),
        borderaxespad=0.2,
        handlelength=2.4,
        columnspacing=1.4,
        labelspacing=0.3,
    )


def _legend_columns(names: Sequence[str]) -> int:
    return max(1, min(len(names), int((WIDTH - 0.2) / (label_width(names) + 0.5))))
