"""Charts of what happened over the steps: validation, the three levers, the conflict of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from mtl.report.comparison import Comparison
from mtl.report.drawing import (
    GREY,
    INK,
    MAX_STRATEGIES,
    WIDTH,
    Drawing,
    add_legend,
    few_ticks,
    label_width,
    legend_head,
    line_style,
    panels,
    shortened,
    shown_strategies,
    shown_tasks,
    what_is_shown,
)
from mtl.report.series import Conflict, Curve, Series

Floats = NDArray[np.float64]
MAX_LEVER_ROWS = 6
MAX_CONFLICTS = 2
MAX_NUMBERS = 12  # tasks; the cells of more have no room for a number
SMOOTHED_PARTS = 20
GREY_ON_DARK = "#b4bec8"
STILL = 1e-6  # a lever that moves less, relative to its size, stands still
LEVERS = {
    "probabilities": "p",
    "weights": "λ",
    "coefficients": "w · tasks",
}


def learning_chart(comparison: Comparison, series: Mapping[str, Series], kind: str) -> Drawing | None:
    """Validation ``losses`` or ``scores`` of each task, a line a strategy; None where there are none."""
    # Its place among all shown gives a strategy its colour, here as in the other charts.
    places = {item.name: place for place, item in enumerate(shown_strategies(comparison)) if item.name in series}
    curves: dict[str, Mapping[str, Curve]] = {name: getattr(series[name], kind) for name in places}
    drawn = {task for own in curves.values() for task, curve in own.items() if len(curve.steps) > 1}
    tasks = [task for task in shown_tasks(comparison) if task in drawn]
    if not tasks:
        return None
    names = list(places)
    figure, axes = panels(len(tasks), height=1.25, left=0.45, head=legend_head(names))
    for panel, task in zip(axes, tasks, strict=True):
        panel.set_title(shortened(task))
        for name, place in places.items():
            if task in curves[name]:
                _draw(panel, curves[name][task], **line_style(place))
        few_ticks(panel)
    add_legend(figure, [Line2D([], [], **line_style(place)) for place in places.values()], names)
    what, better = ("loss, nats per token", "Lower") if kind == "losses" else ("score", "Higher")
    return Drawing(
        figure,
        f"Validation {what}",
        f"Over the steps of training, mean over seeds, before training at step 0. {better} is better; a task that "
        f"turns the wrong way was trained too long or is pushed aside by others.{what_is_shown(comparison)}",
    )


def lever_chart(comparison: Comparison, series: Mapping[str, Series]) -> Drawing | None:
    """What the sampler, the weighter and the surgery did: a row a strategy that moves one; None where none does."""
    moving = {
        item.name: {kind for kind in LEVERS if _moves(getattr(series[item.name], kind))}
        for item in shown_strategies(comparison)
        if item.name in series
    }
    names = [name for name, own in moving.items() if own]
    if not names:
        return None
    kinds = [kind for kind in LEVERS if any(kind in own for own in moving.values())]
    shown = names[:MAX_LEVER_ROWS]
    tasks = shown_tasks(comparison)
    coloured = tasks[:MAX_STRATEGIES]
    figure, axes = panels(
        len(shown) * len(kinds), columns=len(kinds), height=1.15, left=0.5, gap=0.5, head=legend_head(coloured)
    )
    for index, panel in enumerate(axes):
        name, kind = shown[index // len(kinds)], kinds[index % len(kinds)]
        panel.set_title(f"{shortened(name)}: {LEVERS[kind]}" if index % len(kinds) == 0 else LEVERS[kind])
        if kind in moving[name]:
            _draw_lever(panel, getattr(series[name], kind), tasks)
        else:
            panel.set_axis_off()
            panel.text(0, 0.5, "stands still", transform=panel.transAxes, color=GREY)
    add_legend(figure, [Line2D([], [], **line_style(index)) for index in range(len(coloured))], coloured)
    more = len(names) - len(shown)
    return Drawing(
        figure,
        "What the levers did",
        "A line a task over the steps, mean over seeds: how often it is drawn (p), how much its loss counts (λ), and "
        "its part in the applied gradient (w times the number of tasks in the step: 1 is the plain mean). Lines of 40 "
        "points or more are running means over a twentieth of them. Levers that stand still in all strategies are not "
        "drawn." + (f" {more} more strategies move a lever." if more else "") + what_is_shown(comparison),
    )


def _moves(curves: Mapping[str, Curve]) -> bool:
    """Whether any task's curve is more than a level line."""
    return any(
        len(curve.values) > 1
        and np.nanmax(curve.values) - np.nanmin(curve.values) > STILL * np.nanmax(np.abs(curve.values))
        for curve in curves.values()
        if np.isfinite(curve.values).any()
    )


def _draw_lever(panel: Axes, curves: Mapping[str, Curve], tasks: Sequence[str]) -> None:
    for index, task in reversed(list(enumerate(tasks))):
        if task in curves:
            style = line_style(index) if index < MAX_STRATEGIES else {"color": GREY, "alpha": 0.4}
            _draw(panel, _smoothed(curves[task]), **style | {"linewidth": 0.9})
    few_ticks(panel)


def _smoothed(curve: Curve) -> Curve:
    """A running mean over a twentieth of the points: what surgery or a random weighter does jumps from step to step."""
    width = len(curve.values) // SMOOTHED_PARTS
    if width < 2:
        return curve
    window = np.full(width, 1 / width)
    return Curve(np.convolve(curve.steps, window, "valid"), np.convolve(curve.values, window, "valid"))


def _draw(panel: Axes, curve: Curve, **style: str | float) -> None:
    # A curve of few points shows where they are.
    panel.plot(curve.steps, curve.values, marker="." if len(curve.steps) <= 6 else "", **style)  # type: ignore[arg-type]


def conflict_chart(comparison: Comparison, series: Mapping[str, Series]) -> Drawing | None:
    """Mean cosines of the tasks' gradients; None where none were measured."""
    shown = [item.name for item in shown_strategies(comparison) if item.name in series and series[item.name].cosines]
    shown = shown[:MAX_CONFLICTS]
    measured = {task for name in shown for pair in series[name].cosines for task in pair}
    tasks = [task for task in shown_tasks(comparison) if task in measured]
    if not tasks:
        return None
    labels = [f"{shortened(task)}  {number}" for number, task in enumerate(tasks, start=1)]
    left, right, gap = 0.2 + label_width(labels), 0.7, 0.3
    size = (WIDTH - left - right - gap) / 2
    figure, axes = panels(
        len(shown),
        columns=2,
        height=size,
        left=left,
        right=WIDTH - left - len(shown) * size - gap * (len(shown) - 1),
        gap=gap,
    )
    conflicts = [series[name].conflict(tasks) for name in shown]
    limit = max(0.05, *(_largest_off_diagonal(conflict.means_KK) for conflict in conflicts))
    for index, (panel, name, conflict) in enumerate(zip(axes, shown, conflicts, strict=True)):
        mesh = panel.pcolormesh(
            conflict.means_KK, cmap="RdBu", vmin=-limit, vmax=limit, edgecolor="white", linewidth=0.5
        )
        panel.set_title(f"{shortened(name)}: {_counts(conflict)} measurements")
        _mark_cells(panel, conflict, limit)
        places = np.arange(len(tasks)) + 0.5
        panel.set_xticks(places, [str(number + 1) for number in range(len(tasks))])
        panel.set_yticks(places, labels if index == 0 else [""] * len(tasks))
        panel.invert_yaxis()
        panel.grid(visible=False)
        panel.tick_params(length=0)
        panel.spines[["left", "bottom"]].set_visible(False)
    bar = figure.colorbar(mesh, cax=axes[-1].inset_axes((1.04, 0, 0.04, 1)), extend="both")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    return Drawing(
        figure,
        "Conflict of the tasks' gradients",
        "Mean cosine between two halves of a step: blue tasks agree, red ones conflict. The diagonal is a task with "
        "itself: how much of a cosine the noise of half a batch leaves. Grey numbers and cells with a cross "
        "are within two standard errors of 0: neither agreement nor conflict is shown."
        f"{what_is_shown(comparison)}",
    )


def _largest_off_diagonal(means_KK: Floats) -> float:
    apart = np.abs(means_KK[~np.eye(len(means_KK), dtype=bool)])
    return float(np.nanmax(apart)) if np.isfinite(apart).any() else 0.0


def _counts(conflict: Conflict) -> str:
    fewest, most = conflict.counts_KK.min(), conflict.counts_KK.max()
    return f"{most}" if fewest == most else f"{fewest} to {most}"


def _mark_cells(panel: Axes, conflict: Conflict, limit: float) -> None:
    """Numbers, grey where the mean can't be told from 0; for many tasks only crosses there."""
    means, errors = conflict.means_KK, conflict.standard_errors_KK
    open_KK = np.isfinite(means) & ~(np.abs(means) >= 2 * errors)
    if len(means) > MAX_NUMBERS:
        rows, columns = np.nonzero(open_KK)
        panel.plot(columns + 0.5, rows + 0.5, "x", color=GREY, markersize=2.5)
        return
    for (row, column), mean in np.ndenumerate(means):
        if np.isfinite(mean):
            number = f"{mean:z.2f}".replace("0.", ".", 1).replace("-", "\N{MINUS SIGN}")
            on_dark = abs(mean) > 0.6 * limit
            shades = (GREY_ON_DARK, "white") if on_dark else (GREY, INK)
            colour = shades[0 if open_KK[row, column] else 1]
            panel.text(column + 0.5, row + 0.5, number, ha="center", va="center", fontsize=6.5, color=colour)
