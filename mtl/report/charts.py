"""The charts of a comparison: what came out of it, and with :mod:`mtl.report.curve_charts` how it came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isnan, nan
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox, BboxBase
from numpy.typing import NDArray

from mtl.report.comparison import Comparison, Interval, StrategyOutcome
from mtl.report.curve_charts import conflict_chart, learning_chart, lever_chart
from mtl.report.drawing import (
    BLUE,
    COLUMNS,
    GREY,
    INK,
    RED,
    Chart,
    Drawing,
    add_legend,
    charts_style,
    compared_value,
    few_ticks,
    label_width,
    legend_head,
    marker_style,
    panels,
    save,
    shortened,
    shown_strategies,
    shown_tasks,
    what_is_shown,
)
from mtl.report.series import Series

Floats = NDArray[np.float64]
ROW = 0.15  # inches of a strategy or task in a list
HALO = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # keeps a name readable over a line
WIDE_RANGE = 20  # from here on the ratio of largest to smallest needs a logarithmic axis


def draw_charts(comparison: Comparison, series: Mapping[str, Series], folder: Path) -> list[Chart]:
    """Draws every chart that there are data for, and saves each as SVG and PNG.

    Args:
        comparison: What the runs came to.
        series: By the strategies' names; one may be missing.
        folder: Where the files go; it exists.
    """
    drawers: dict[str, Callable[[Comparison], Drawing | None]] = {
        "tasks": forest_chart,
        "mean_and_worst": pareto_chart,
        "validation_loss": partial(learning_chart, series=series, kind="losses"),
        "validation_score": partial(learning_chart, series=series, kind="scores"),
        "levers": partial(lever_chart, series=series),
        "conflict": partial(conflict_chart, series=series),
        "epochs": epochs_chart,
        "cost": cost_chart,
    }
    charts = []
    with charts_style():
        for name, draw in drawers.items():
            drawing = draw(comparison)
            if drawing is not None:
                charts.append(save(name, drawing, folder))
            else:  # one of an earlier report must not stand beside this one
                for kind in ("svg", "png"):
                    (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return charts


def forest_chart(comparison: Comparison) -> Drawing:
    """Each strategy's value and interval: its mean over the tasks, then every task."""
    strategies, tasks = shown_strategies(comparison), shown_tasks(comparison)
    names = [item.name for item in strategies]
    left = 0.15 + label_width(names)
    figure, axes = panels(1 + len(tasks), height=0.1 + ROW * len(names), left=left, gap=0.3)
    titles = ["mean over the tasks", *tasks]
    rows = [[item.mean for item in strategies]]
    rows += [[compared_value(item.tasks[task]) for item in strategies] for task in tasks]
    for index, (panel, title, values) in enumerate(zip(axes, titles, rows, strict=True)):
        panel.set_title(shortened(title), fontweight="bold" if index == 0 else "normal")
        _draw_intervals(panel, values, comparison)
        labels = map(shortened, names) if index % COLUMNS == 0 else []
        panel.set_yticks(range(len(names)), labels or [""] * len(names))
    kind = "Change against " + comparison.reference_name if comparison.reference_name else "Test score"
    certain = (
        " Blue: the whole interval is better than the reference, orange: worse." if comparison.reference_name else ""
    )
    return Drawing(
        figure,
        f"{kind}, task by task",
        "Points are means over seeds, bars 95 % intervals; further right is better."
        f"{certain}{what_is_shown(comparison)}",
    )


def _draw_intervals(panel: Axes, values: Sequence[Interval], comparison: Comparison) -> None:
    compared = comparison.reference_name is not None
    for row, interval in enumerate(values):
        colour = INK
        if compared:
            colour = BLUE if interval.low > 0 else RED if interval.high < 0 else GREY
        if not isnan(interval.low):
            panel.plot([interval.low, interval.high], [row, row], color=colour, solid_capstyle="butt")
        panel.plot(interval.value, row, "o", color=colour)
    if compared:
        panel.axvline(0, color=INK, linewidth=0.7)
        panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.set_ylim(len(values) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(3))


def pareto_chart(comparison: Comparison) -> Drawing | None:
    """The worst task over the mean; None of a single strategy."""
    points = [item for item in comparison.strategies if not isnan(item.mean.value + item.worst.value)]
    if len(points) < 2:
        return None
    figure, (panel,) = panels(1, height=3.4, left=0.7)
    front = sorted((item for item in points if item.on_pareto_front), key=lambda item: item.mean.value)
    others = [item for item in points if not item.on_pareto_front]
    panel.margins(0.12)
    panel.plot(*_coordinates(others), "o", color=GREY, alpha=0.7, zorder=4)
    panel.plot(*_coordinates(front), "o", color=BLUE, markersize=5, zorder=4)
    panel.step(*_coordinates(front), where="pre", color=BLUE, linewidth=0.8, alpha=0.5)
    if comparison.reference_name:
        _mark_zero(panel)
    few_ticks(panel)
    what = "change" if comparison.reference_name else "score"
    panel.set_xlabel(f"mean {what} over the tasks", labelpad=2)
    panel.set_ylabel(f"{what} of the worst task", labelpad=2)
    shown = [item for item in shown_strategies(comparison) if item in others]
    unnamed = len(points) - _label_points(panel, [*front, *others], [*front, *shown])
    return Drawing(
        figure,
        "Mean against worst task",
        "Each point is a strategy; up and to the right is better. Those in blue are on the Pareto front: no other is "
        "at least as good in both and better in one. Near ones may not be told apart; see the intervals."
        + (f" {unnamed} points have no name here; summary.csv has them." if unnamed else ""),
    )


def _mark_zero(panel: Axes) -> None:
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    if left < 0 < right:
        panel.axvline(0, color=INK, linewidth=0.7)
    if bottom < 0 < top:
        panel.axhline(0, color=INK, linewidth=0.7)
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.yaxis.set_major_formatter(PercentFormatter(1))


def _coordinates(items: Sequence[StrategyOutcome]) -> tuple[list[float], list[float]]:
    return [item.mean.value for item in items], [item.worst.value for item in items]


def _label_points(panel: Axes, points: Sequence[StrategyOutcome], named: Sequence[StrategyOutcome]) -> int:
    """Writes names beside their points, each where it covers no other name and no point, or not at all.

    Returns:
        How many are written.
    """
    panel.set(xlim=panel.get_xlim(), ylim=panel.get_ylim())  # from here on they stay, so that the names do
    figure = panel.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    centres = dict(
        zip(
            [item.name for item in points],
            panel.transData.transform(list(zip(*_coordinates(points), strict=True))),
            strict=True,
        )
    )
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres.values()]
    written = 0
    for item in named:
        colour = BLUE if item.on_pareto_front else GREY
        text = panel.text(0, 0, shortened(item.name), color=colour, va="bottom", fontsize=7.5, bbox=HALO)
        place = _free_place(centres[item.name], text.get_window_extent(renderer), panel, taken)
        if place is None:
            text.remove()
            continue
        text.set_position(tuple(panel.transData.inverted().transform(place.min)))
        taken.append(place)
        written += 1
        # To a name that had to go further off, a line.
        nearest = np.clip(centres[item.name], place.min, place.max)
        line = panel.transData.inverted().transform([centres[item.name], nearest])
        panel.plot(*line.T, color=colour, linewidth=0.4, alpha=0.6, zorder=1)
    return written


def _free_place(centre: Floats, size: BboxBase, panel: Axes, taken: Sequence[Bbox]) -> Bbox | None:
    """The nearest of some places around a point [pixels]."""
    for distance in (7, 16, 28, 42, 58):
        for across, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            x = centre[0] + distance * across + size.width * (across - 1) / 2
            y = centre[1] + distance * up + size.height * (up - 1) / 2
            box = Bbox.from_bounds(x, y, size.width, size.height)
            inside = (
                panel.bbox.containsx(box.x0)
                and panel.bbox.containsx(box.x1)
                and panel.bbox.containsy(box.y0)
                and panel.bbox.containsy(box.y1)
            )
            if inside and not box.count_overlaps(taken):
                return box
    return None


def epochs_chart(comparison: Comparison) -> Drawing:
    """Epochs of each task that each strategy saw."""
    strategies, tasks = shown_strategies(comparison), shown_tasks(comparison)
    names = [item.name for item in strategies]
    head = legend_head(names)
    figure, (panel,) = panels(1, height=0.2 + 0.22 * len(tasks), left=0.15 + label_width(tasks), head=head)
    rows = range(len(tasks))
    handles = []
    for index, item in enumerate(strategies):
        epochs = [item.tasks[task].epochs_seen for task in tasks]
        handles += panel.plot(epochs, rows, alpha=0.8, **marker_style(index))
    seen = [item.tasks[task].epochs_seen for item in strategies for task in tasks if item.tasks[task].epochs_seen > 0]
    if seen and max(seen) > WIDE_RANGE * min(seen):
        panel.set_xscale("symlog", linthresh=min(seen))  # logarithmic, and has a place for 0
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # the default's is TeX, which stays text in an SVG
    else:
        panel.set_xlim(left=0)
    panel.set_yticks(rows, list(map(shortened, tasks)))
    panel.set_ylim(len(tasks) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.set_title("epochs of the training set")
    add_legend(figure, handles, names)
    return Drawing(
        figure,
        "Epochs seen",
        "How often a strategy has gone through a task's training set. Far below 1, most examples were never seen; "
        f"above about 5, a small task may be learned by heart.{what_is_shown(comparison)}",
    )


def cost_chart(comparison: Comparison) -> Drawing:
    """Tokens, time and memory, mean over seeds."""
    strategies = shown_strategies(comparison)
    names = [item.name for item in strategies]
    columns = {
        "million tokens": [item.cost.tokens / 1e6 for item in strategies],
        "minutes": [item.cost.seconds / 60 for item in strategies],
        "peak memory, GB": [
            nan if (peak := item.cost.peak_memory_bytes) is None else peak / 1e9 for item in strategies
        ],
    }
    known = {title: values for title, values in columns.items() if not all(map(isnan, values))}
    height = 0.1 + 0.19 * len(names)
    figure, axes = panels(len(known), height=height, left=0.15 + label_width(names), gap=0.25)
    for index, (panel, (title, values)) in enumerate(zip(axes, known.items(), strict=True)):
        panel.barh(range(len(names)), values, height=0.6, color=BLUE, alpha=0.75)
        panel.set_title(title)
        panel.set_yticks(range(len(names)), [shortened(name) if index == 0 else "" for name in names])
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)
        few_ticks(panel, "x")
    return Drawing(
        figure,
        "Cost of training",
        "Mean over seeds, evaluation included. Time compares strategies only where each had the same machine to itself."
        f"{what_is_shown(comparison)}",
    )
