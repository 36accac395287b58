"""The comparison as one HTML page that needs nothing but itself, with its charts and numbers as files beside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from math import isfinite, isnan
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mtl.errors import UserError
from mtl.report.csv_files import duels_over_mean, write_csv_files
from mtl.report.series import Series, mean_series, read_series
from mtl.report.words import number, percent
from mtl.reporting.json_files import write_atomically

if TYPE_CHECKING:
    from mtl.report.bad_cases import Case
    from mtl.report.comparison import Comparison, Interval, StrategyOutcome, TaskOutcome

NOTHING = "\N{EN DASH}"


def write_report(
    folder: Path, comparison: Comparison, cases: Sequence[Case] | None = None, *, sentences: Sequence[str] = ()
) -> Path:
    """Writes ``report.html``, ``summary.csv``, ``tasks.csv``, and each chart as ``charts/<name>.svg`` and ``.png``.

    Args:
        folder: Where to; made if it is not there. What an earlier report left is replaced.
        comparison: What the runs came to.
        cases: The worst examples; None leaves that part out.
        sentences: The verdict in words.

    Returns:
        The page.

    Raises:
        UserError: The folder can't be written.
    """
    # Reading matplotlib takes half a second, which nobody should pay who only asks for help.
    from mtl.report.charts import draw_charts
    from mtl.report.drawing import shown_strategies, shown_tasks

    try:
        (folder / "charts").mkdir(parents=True, exist_ok=True)
        strategies = shown_strategies(comparison)
        series, notes = _read_all(strategies, comparison)
        charts = draw_charts(comparison, series, folder / "charts")
        write_csv_files(folder, comparison)
        script = files("mtl.report").joinpath("templates/report.js").read_text(encoding="utf-8")
        page = (
            _environment(comparison)
            .get_template("report.html")
            .render(
                comparison=comparison,
                sentences=sentences,
                notes=[*comparison.notes, *notes],
                strategies=strategies,
                tasks=shown_tasks(comparison),
                duels=duels_over_mean(comparison),
                charts=charts,
                cases=cases,
                script=Markup(script),
                script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            )
        )
        path = folder / "report.html"
        # A parser drops NUL, which then no one would see.
        write_atomically(path, page.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(
            f"{folder}: must be a folder that can be written, found: {error.strerror}. Name another with --output."
        ) from error
    return path


def _read_all(strategies: Sequence[StrategyOutcome], comparison: Comparison) -> tuple[dict[str, Series], list[str]]:
    """The series of these strategies; notes on runs that have none."""
    series, notes = {}, []
    for item in strategies:
        own = []
        for run in item.runs:
            try:
                own.append(read_series(run.metrics_file, comparison.metrics))
            except UserError as error:
                notes.append(f"left out of the curves: {error}")
        if own:
            series[item.name] = mean_series(own)
    return series, notes


def _environment(comparison: Comparison) -> Environment:
    environment = Environment(
        loader=PackageLoader("mtl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def value(quantity: float) -> str:
        return NOTHING if isnan(quantity) else _typographic(number(quantity, comparison))

    def interval(of: Interval) -> str:
        return "" if isnan(of.low) else f"[{value(of.low)}, {value(of.high)}]".replace(" %", "")

    environment.filters |= {
        "value": value,
        "interval": interval,
        "number": _number,
        "change": lambda quantity: NOTHING if isnan(quantity) else _typographic(percent(quantity)),
        "p": _p,
        "sortable": lambda quantity: f"{quantity:.9g}" if quantity is not None and isfinite(quantity) else "",
        "certainty": _certainty,
    }
    return environment


def _number(quantity: float, digits: int = 3) -> str:
    return NOTHING if isnan(quantity) else _typographic(f"{quantity:.{digits}f}")


def _p(probability: float | None) -> str:
    if probability is None or isnan(probability):
        return NOTHING
    return "< .001" if probability < 0.001 else f"{probability:.3f}".lstrip("0")


def _certainty(task: TaskOutcome) -> str:
    """The class of a cell: whether the whole interval of the change is on one side of 0."""
    if task.change is None:
        return ""
    return "better" if task.change.low > 0 else "worse" if task.hurt else ""


def _typographic(text: str) -> str:
    """With a minus as wide as a plus, so that numbers stand in columns."""
    return text.replace("-", "\N{MINUS SIGN}")
