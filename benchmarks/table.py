"""From measurements to the lines of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.comparisons import Claim, Comparison, Quantity
from benchmarks.measuring import Measurement

HEADER = "| | mtl | the other | ratio | spread | target | met | peak memory: mtl | the other |"
VALUES: dict[Quantity, Callable[[Measurement], float]] = {
    "seconds": lambda found: found["seconds"],
    "seconds a token": lambda found: found["seconds"] / found["num_tokens"],
    "examples a second": lambda found: found["num_examples"] / found["seconds"],
    "peak memory": lambda found: found["peak_bytes"],
    "overhead": lambda found: found["overhead"],
}


@dataclass(frozen=True)
class Row:
    """A line of the table. Ratios are of the same round, and the median and the extremes are taken of them.

    ``ratio`` is how many times better ours is, or, where the target is ``at_most``, how many times worse; of a number
    that stands alone it is that number.
    """

    comparison: str
    what: str
    quantity: Quantity
    ours: str
    other: str | None
    ours_value: float
    other_value: float | None
    ratio: float
    lowest: float
    highest: float
    at_least: float | None
    at_most: float | None
    ours_peak_bytes: float
    other_peak_bytes: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target is; ``None`` without one."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return None if self.at_most is None else self.ratio <= self.at_most


def make_row(comparison: Comparison, claim: Claim, found: dict[str, list[Measurement]]) -> Row:
    """Evaluates a claim."""
    value = VALUES[claim.quantity]
    ours = [value(measurement) for measurement in found[claim.ours]]
    other = None if claim.other is None else [value(measurement) for measurement in found[claim.other]]
    ratios = ours
    if other is not None:
        more_is_better = claim.quantity == "examples a second"
        upside_down = (claim.at_most is None) != more_is_better
        ratios = [b / a if upside_down else a / b for a, b in zip(ours, other, strict=True)]
    return Row(
        comparison=comparison.name,
        what=claim.what,
        quantity=claim.quantity,
        ours=claim.ours,
        other=claim.other,
        ours_value=median(ours),
        other_value=None if other is None else median(other),
        ratio=median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        at_least=claim.at_least,
        at_most=claim.at_most,
        ours_peak_bytes=peak(found[claim.ours]),
        other_peak_bytes=None if claim.other is None else peak(found[claim.other]),
    )


def peak(found: Sequence[Measurement]) -> float:
    """The largest peak memory of all rounds [bytes]."""
    return max(measurement["peak_bytes"] for measurement in found)


def markdown(rows: Sequence[Row], caption: str) -> str:
    """The table."""
    lines = [caption, "", HEADER, "|" + "---|" * HEADER.count(" | ") + "---|"]
    return "\n".join([*lines, *(markdown_line(row) for row in rows)]) + "\n"


def markdown_line(row: Row) -> str:
    """A row as a line of the table."""
    alone = row.other_value is None
    target = ""
    if row.at_least is not None:
        target = f"at least {row.at_least:g}x"
    elif row.at_most is not None:
        target = f"at most {shown(row.at_most, row.quantity) if alone else f'{row.at_most:.2f}x'}"
    cells = [
        row.what,
        shown(row.ours_value, row.quantity),
        "" if row.other_value is None else f"{shown(row.other_value, row.quantity)} ({row.other})",
        "" if alone else f"{row.ratio:.2f}x",
        f"{shown(row.lowest, row.quantity)} to {shown(row.highest, row.quantity)}"
        if alone
        else f"{row.lowest:.2f} to {row.highest:.2f}",
        target,
        {True: "yes", False: "**no**", None: ""}[row.met],
        gibibytes(row.ours_peak_bytes),
        "" if row.other_peak_bytes is None else gibibytes(row.other_peak_bytes),
    ]
    return f"| {' | '.join(cells)} |"


def shown(value: float, quantity: Quantity) -> str:
    """A value with its unit."""
    match quantity:
        case "seconds":
            return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.2f} ms"
        case "seconds a token":
            return f"{1000 * value:.2f} ms/token"
        case "examples a second":
            return f"{value:.2f} examples/s"
        case "peak memory":
            return gibibytes(value)
        case "overhead":
            return f"{100 * value:.2f} %"


def gibibytes(num_bytes: float) -> str:
    """Memory."""
    return f"{num_bytes / 2**30:.2f} GiB"
