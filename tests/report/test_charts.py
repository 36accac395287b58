"""The charts: what they show, what they leave out, and that a person can read it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mtl.report.charts import cost_chart, draw_charts, epochs_chart, forest_chart, pareto_chart
from mtl.report.curve_charts import GREY_ON_DARK, conflict_chart, learning_chart, lever_chart
from mtl.report.drawing import BLUE, GREY, RED, charts_style, shown_strategies, shown_tasks
from mtl.report.series import Curve, Moments, Series, mean_series, read_series

NASTY = [
    "<b>&amp;</b>",
    "情感 😀",
    "مشاعر",
    "$x_1$ & \\alpha",
    "a name that is much too long for the room beside an axis",
]
CHANGES = {"pcgrad": {"a": 0.2, "b": -0.02}, "equal": {"a": 0.1, "b": 0.0}, "rlw": {"a": -0.1, "b": -0.2}}


@pytest.fixture(autouse=True)
def style():
    with charts_style():
        yield


def level(value, steps=(0, 10, 20)):
    return Curve(np.array(steps, dtype=float), np.full(len(steps), value))


def rising(*values):
    return Curve(np.arange(len(values), dtype=float), np.array(values, dtype=float))


def texts(drawing):
    """All that is written in a figure."""
    FigureCanvasAgg(drawing.figure).draw()
    found = [text.get_text() for text in drawing.figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return [text for text in found if text]


def titles(drawing):
    return [axes.get_title(loc="left") for axes in drawing.figure.axes]


def many(num_strategies, num_tasks=2):
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 0.1, size=(num_strategies, num_tasks)) - np.linspace(0, 0.5, num_strategies)[:, None]
    return {f"strategy {i}": {f"task {j}": float(value) for j, value in enumerate(row)} for i, row in enumerate(rows)}


def test_forest_marks_what_is_certain(make_comparison):
    drawing = forest_chart(make_comparison(CHANGES, half_width=0.15))
    assert titles(drawing) == ["mean over the tasks", "a", "b"]
    panel = drawing.figure.axes[1]
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == [0.2, 0.1, -0.1]
    assert [dot.get_color() for dot in dots] == [BLUE, GREY, GREY]
    bars = [
        line.get_xdata() for line in panel.lines if len(line.get_xdata()) == 2 and line.get_solid_capstyle() == "butt"
    ]
    np.testing.assert_allclose(bars[:3], [[0.05, 0.35], [-0.05, 0.25], [-0.25, 0.05]])
    assert [line.get_color() for line in drawing.figure.axes[2].lines if line.get_marker() == "o"][-1] == RED
    assert [label.get_text() for label in panel.get_yticklabels()] == ["", "", ""]
    assert [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()] == list(CHANGES)


def test_forest_of_scores_has_no_line_at_zero(make_comparison):
    drawing = forest_chart(make_comparison(CHANGES, compared=False))
    assert "Test score" in drawing.title
    assert all(line.get_xdata()[0] > 0.3 for axes in drawing.figure.axes for line in axes.lines)


def test_forest_without_intervals(make_comparison):
    panel = forest_chart(make_comparison(CHANGES, half_width=math.nan)).figure.axes[1]
    assert [line.get_color() for line in panel.lines if line.get_marker() == "o"] == [GREY] * 3


@pytest.mark.parametrize("num_strategies", [3, 67])
def test_names_of_points_cover_nothing(make_comparison, num_strategies):
    drawing = pareto_chart(make_comparison(many(num_strategies)))
    panel = drawing.figure.axes[0]
    canvas = FigureCanvasAgg(drawing.figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in panel.texts]
    assert len(boxes) >= min(num_strategies, 8)
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    points = np.concatenate([line.get_xydata() for line in panel.lines if line.get_marker() == "o"])
    assert len(points) == num_strategies
    assert not any(box.contains(*point) for box in boxes for point in panel.transData.transform(points))
    assert all(panel.bbox.padded(2).contains(*box.min) and panel.bbox.padded(2).contains(*box.max) for box in boxes)
    unnamed = num_strategies - len(boxes)
    assert (f"{unnamed} points have no name" in drawing.caption) == (unnamed > 0)


def test_the_front_is_blue(make_comparison):
    panel = pareto_chart(make_comparison(CHANGES)).figure.axes[0]
    colours = {text.get_text(): text.get_color() for text in panel.texts}
    assert colours == {"pcgrad": BLUE, "equal": BLUE, "rlw": GREY}


@pytest.mark.parametrize("changes", [{"only": {"a": 0.1}}, {"one": {"a": 0.1}, "nan": {"a": math.nan}}])
def test_one_point_is_no_front(make_comparison, changes):
    assert pareto_chart(make_comparison(changes)) is None


def test_equal_points_are_drawn(make_comparison):
    drawing = pareto_chart(make_comparison({name: {"a": 0.1, "b": 0.1} for name in "xyz"}))
    assert {"x", "y", "z"} <= set(texts(drawing))


def test_learning_curves(make_comparison):
    series = {
        "pcgrad": Series(losses={"a": rising(3, 2, 1), "b": rising(3, 2, math.nan)}, scores={"a": rising(0.1, 0.2)}),
        "equal": Series(losses={"a": rising(3, 2.5)}),
    }
    drawing = learning_chart(make_comparison(CHANGES), series, "losses")
    assert titles(drawing) == ["a", "b"]
    first, second = drawing.figure.axes
    assert [line.get_ydata().tolist() for line in first.lines] == [[3, 2, 1], [3, 2.5]]
    assert len(second.lines) == 1
    assert titles(learning_chart(make_comparison(CHANGES), series, "scores")) == ["a"]
    assert learning_chart(make_comparison(CHANGES), {"equal": series["equal"]}, "scores") is None
    assert learning_chart(make_comparison(CHANGES), {}, "losses") is None


def test_a_strategy_looks_the_same_in_every_chart(make_comparison):
    comparison = make_comparison(CHANGES)
    epochs = epochs_chart(comparison).figure
    colours = {
        text.get_text(): line.get_color()
        for text, line in zip(epochs.legends[0].texts, epochs.legends[0].get_lines(), strict=True)
    }
    assert len(set(colours.values())) == len(CHANGES)
    figure = learning_chart(comparison, {"rlw": Series(losses={"b": rising(1, 2)})}, "losses").figure
    (name,), (handle,) = figure.legends[0].texts, figure.legends[0].get_lines()
    assert (name.get_text(), handle.get_color()) == ("rlw", colours["rlw"])
    assert figure.axes[0].lines[0].get_color() == colours["rlw"]


def test_levers_that_move(make_comparison):
    still = {"a": level(0.5), "b": level(0.5)}
    series = {
        "pcgrad": Series(probabilities=still, weights=still, coefficients={"a": rising(1, 1.2), "b": rising(1, 0.8)}),
        "equal": Series(probabilities=still, weights=still),
        "rlw": Series(probabilities=still, weights={"a": rising(0.9, 1.1, 1), "b": level(math.nan)}),
    }
    drawing = lever_chart(make_comparison(CHANGES), series)
    assert titles(drawing) == ["pcgrad: λ", "w · tasks", "rlw: λ", "w · tasks"]
    assert [len(axes.lines) for axes in drawing.figure.axes] == [0, 2, 2, 0]
    assert texts(drawing).count("stands still") == 2
    assert lever_chart(make_comparison(CHANGES), {"equal": series["equal"]}) is None
    wobbling = {"a": rising(1, 1 + 1e-9)}
    assert lever_chart(make_comparison(CHANGES), {"equal": Series(weights=wobbling)}) is None


def test_levers_that_jump_are_smoothed(make_comparison):
    steps = np.arange(1.0, 101)
    weights = {"a": Curve(steps, 1 + 0.5 * (-1) ** steps), "b": Curve(steps, steps)}
    axes = lever_chart(make_comparison(CHANGES), {"rlw": Series(weights=weights)}).figure.axes[0]
    straight, jumping = axes.lines  # the first task is drawn last
    assert straight.get_xdata() == pytest.approx(straight.get_ydata())
    assert np.ptp(jumping.get_ydata()) == pytest.approx(0.2)


def measured(*values):
    moments = Moments()
    for value in values:
        moments.add(Moments(1, value, value**2))
    return moments


def test_conflict_marks_what_is_not_told_from_zero(make_comparison):
    cosines = {
        ("a", "a"): measured(0.4, 0.5),
        ("a", "b"): measured(-0.3, -0.2),
        ("b", "a"): measured(0.1, 0.4),  # 1.7 standard errors
        ("b", "b"): measured(0.1),
    }
    drawing = conflict_chart(make_comparison(CHANGES), {"pcgrad": Series(cosines=cosines)})
    panel = drawing.figure.axes[0]
    cells = {tuple(text.get_position()): (text.get_text(), text.get_color()) for text in panel.texts}
    minus = "\N{MINUS SIGN}"
    assert cells[1.5, 0.5][0] == f"{minus}.25"
    assert cells[1.5, 0.5][1] != GREY
    assert cells[0.5, 1.5] == (".25", GREY_ON_DARK)  # grey would not be read on dark blue
    assert cells[1.5, 1.5] == (".10", GREY)  # a single measurement shows nothing
    assert cells[0.5, 0.5] == (".45", "white")
    assert panel.get_title(loc="left") == "pcgrad: 1 to 2 measurements"
    mesh = panel.collections[0]
    assert mesh.norm.vmin == -mesh.norm.vmax == pytest.approx(-0.25)
    assert panel.yaxis_inverted()


def test_conflict_of_many_tasks_has_crosses(make_comparison):
    tasks = [f"task {i}" for i in range(20)]
    cosines = {(a, b): measured(0.1, 0.1) if a == b else measured(0.1, -0.1) for a in tasks for b in tasks}
    changes = {"x": dict.fromkeys(tasks, 0.1), "y": dict.fromkeys(tasks, 0.0)}
    panel = conflict_chart(make_comparison(changes), {"y": Series(cosines=cosines)}).figure.axes[0]
    assert not panel.texts
    assert len(panel.lines[0].get_xdata()) == 20 * 19


@pytest.mark.parametrize("cosines", [{}, {("elsewhere", "elsewhere"): measured(0.1)}])
def test_no_conflict_measured(make_comparison, cosines):
    assert conflict_chart(make_comparison(CHANGES), {"pcgrad": Series(cosines=cosines)}) is None
    assert conflict_chart(make_comparison(CHANGES), {}) is None


def test_conflict_of_one_task(make_comparison):
    series = {"x": Series(cosines={("a", "a"): measured(0.0, 0.0)})}
    assert conflict_chart(make_comparison({"x": {"a": 0.1}}), series) is not None


@pytest.mark.parametrize(("epochs", "scale"), [((0.5, 2.0), "linear"), ((0.01, 2.0), "symlog"), ((0.0, 0.0), "linear")])
def test_epochs(make_comparison, epochs, scale):
    comparison = make_comparison({"x": {"a": 0.1, "b": 0.2}})
    for outcome, seen in zip(comparison.strategies[0].tasks.values(), epochs, strict=True):
        object.__setattr__(outcome, "epochs_seen", seen)
    panel = epochs_chart(comparison).figure.axes[0]
    assert tuple(panel.lines[0].get_xdata()) == epochs
    assert panel.get_xscale() == scale


def test_cost_without_a_known_memory(make_comparison):
    comparison = make_comparison(CHANGES)
    assert titles(cost_chart(comparison)) == ["million tokens", "minutes", "peak memory, GB"]
    for item in comparison.strategies:
        object.__setattr__(item.cost, "peak_memory_bytes", None)
    drawing = cost_chart(comparison)
    assert titles(drawing) == ["million tokens", "minutes"]
    assert [bar.get_width() for bar in drawing.figure.axes[1].patches] == [1.25] * 3


def test_many_strategies(make_comparison):
    changes = many(67)
    changes["strategy 60"] = dict.fromkeys(changes["strategy 60"], 0.9)  # last by its place, with the best worst task
    comparison = make_comparison(changes)
    shown = [item.name for item in shown_strategies(comparison)]
    assert shown == [*(f"strategy {i}" for i in range(11)), "strategy 60"]
    drawing = forest_chart(comparison)
    assert [label.get_text() for label in drawing.figure.axes[0].get_yticklabels()] == shown
    assert "12 best of 67" in drawing.caption


def test_many_tasks(make_comparison):
    changes = {"x": {f"task {i}": i / 1000 for i in range(1000)}}
    comparison = make_comparison(changes)
    assert shown_tasks(comparison) == [f"task {i}" for i in (*range(8), *range(996, 1000))]
    drawing = forest_chart(comparison)
    assert len(drawing.figure.axes) == 13
    assert "8 lowest and 4 highest of 1,000 tasks" in drawing.caption


def test_files(make_comparison, make_run, tmp_path):
    tasks = dict.fromkeys(NASTY, "accuracy")
    changes = {name: dict.fromkeys(NASTY, 0.1) for name in NASTY}
    comparison = make_comparison(changes)
    path = make_run("x", tasks=dict.fromkeys("abcde", "accuracy"), conflict_every=5, scored=True) / "metrics.jsonl"
    one = read_series(path, dict.fromkeys("abcde", "accuracy"))
    renamed = dict(zip("abcde", tasks, strict=True))
    kinds = ("losses", "scores", "probabilities", "weights", "coefficients")
    curves = {kind: {renamed[name]: curve for name, curve in getattr(one, kind).items()} for kind in kinds}
    cosines = {(renamed[a], renamed[b]): moments for (a, b), moments in one.cosines.items()}
    series = {name: mean_series([Series(**curves, cosines=cosines)]) for name in NASTY}
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        charts = draw_charts(comparison, series, folder)
    names = ["tasks", "mean_and_worst", "validation_loss", "validation_score", "levers", "conflict", "epochs", "cost"]
    assert [chart.name for chart in charts] == names
    assert sorted(path.name for path in folders[0].iterdir()) == sorted(
        f"{n}.{kind}" for n in names for kind in ("svg", "png")
    )
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), "equal input must give equal files"
    for chart in charts:
        written = "".join(ElementTree.fromstring(chart.svg).itertext())
        assert "$x_1$ & \\alpha" in written or chart.name == "cost"
        assert "情感 😀" in written
        assert 'id="figure' not in chart.svg
        assert "http" not in chart.svg.replace("http://www.w3.org", "")
        assert len(chart.svg) < 500_000


def test_a_chart_of_an_earlier_report_goes(make_comparison, tmp_path):
    for name in ("conflict.svg", "conflict.png", "my own.svg"):
        (tmp_path / name).touch()
    draw_charts(make_comparison(CHANGES), {}, tmp_path)
    assert not (tmp_path / "conflict.svg").exists()
    assert not (tmp_path / "conflict.png").exists()
    assert (tmp_path / "my own.svg").exists()
    assert (tmp_path / "tasks.svg").exists()
