"""What the judges of a blind page found: which strategy they prefer, and how far they agree.

Preference is counted by strategy. Agreement is measured by what a judge pressed (A, B or tie): who doesn't look can
only favour a button, and behind each button either strategy is in half of the items, so that agreement by chance stays
low even where one strategy is far better.

Shape suffixes: N items, C choices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mtl.errors import UserError
from mtl.evaluation.statistics import holm
from mtl.report.blind import BlindItem, BlindKey

if TYPE_CHECKING:
    from rich.console import Console

CHOICES = ("A", "B", "tie")


@dataclass(frozen=True)
class Preference:
    """How many items each of two strategies wins: those where more judges prefer its answer than the other's.

    Args:
        wins: Of the first and of the second strategy.
        ties: Items where as many judges prefer the one as the other.
        p: Two-sided p of the exact sign test over items, ties left out; a task's is adjusted by Holm over the tasks.
    """

    wins: tuple[int, int]
    ties: int
    p: float


@dataclass(frozen=True)
class Agreement:
    """How far judges agree on the items that all of them judged.

    Args:
        num_items: How many these are.
        share: Share of the pairs of judges that chose the same, averaged over the items.
        kappa: Cohen's kappa of two judges, Fleiss' of more; None where all choices are the same one, since nothing
            then tells agreement from chance.
    """

    num_items: int
    share: float
    kappa: float | None


@dataclass(frozen=True)
class Judgements:
    """All that the judges of a page found.

    Args:
        key: The page's.
        judges: Their names.
        overall: Over all items that anyone judged.
        tasks: The same by task.
        agreement: None with one judge, or where no item was judged by all.
        median_seconds: Of a judgement.
    """

    key: BlindKey
    judges: Sequence[str]
    overall: Preference
    tasks: Mapping[str, Preference]
    agreement: Agreement | None
    median_seconds: float


@dataclass(frozen=True)
class _Judge:
    name: str
    choices: Mapping[str, str]  # by item
    seconds: Sequence[float]


def read_judgements(paths: Sequence[Path], key_path: Path) -> Judgements:
    """Reads what judges have saved.

    Args:
        paths: One file a judge.
        key_path: The ``blind_key.json`` of the page.

    Raises:
        UserError: A file is missing, damaged, of another page, or without a judgement; or two are of one judge.
    """
    key = _read_key(key_path)
    judges: dict[str, _Judge] = {}
    for path in paths:
        judge = _read_judge(path, key, key_path)
        if judge.name in judges:
            raise UserError(f"{path}: must be of another judge than the files before, found {judge.name!r}; drop one.")
        judges[judge.name] = judge
    # How many more judges prefer the second strategy than the first.
    margins = {
        name: sum(_vote(item, judge.choices.get(name, "tie")) for judge in judges.values())
        for name, item in key.items.items()
        if any(name in judge.choices for judge in judges.values())
    }
    names = dict.fromkeys(key.items[name].task for name in margins)
    tasks = {task: _preference([m for name, m in margins.items() if key.items[name].task == task]) for task in names}
    adjusted = holm([preference.p for preference in tasks.values()])
    return Judgements(
        key=key,
        judges=list(judges),
        overall=_preference(list(margins.values())),
        tasks={task: replace(tasks[task], p=float(p)) for task, p in zip(tasks, adjusted, strict=True)},
        agreement=_agreement([judge.choices for judge in judges.values()]),
        median_seconds=median(seconds for judge in judges.values() for seconds in judge.seconds),
    )


def fleiss_kappa(counts_NC: ArrayLike) -> float | None:
    """Agreement beyond chance of a fixed number of judges, at least two; None where all chose the same.

    ``(P - Pe) / (1 - Pe)``: P is the share of agreeing pairs of judges, averaged over items, Pe the sum of the squared
    shares of the choices. Source: Fleiss, Psychological Bulletin 1971.

    Args:
        counts_NC: How many judges gave each item each choice [N, C].
    """
    counts = np.asarray(counts_NC, dtype=np.float64)
    by_chance = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return None if by_chance == 1 else (_agreeing_pairs(counts) - by_chance) / (1 - by_chance)


def print_judgements(console: Console, judgements: Judgements) -> None:
    """Prints a table with a row over all items and one a task, and below it how far the judges agree."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("preferred by most judges", *judgements.key.strategies, "ties", "p"):
        table.add_column(Text(heading), justify="right" if table.columns else "left", overflow="fold")
    for name, item in [("all items", judgements.overall), *judgements.tasks.items()]:
        table.add_row(*map(Text, (name, *map(str, item.wins), str(item.ties), f"{item.p:.3g}")))
    console.print(table)
    for remark in _remarks(judgements):
        console.print(Text(remark, "dim"))


def _remarks(judgements: Judgements) -> list[str]:
    judges, agreement, key = judgements.judges, judgements.agreement, judgements.key
    num_judged = sum(judgements.overall.wins) + judgements.overall.ties
    remarks = [
        f"{num_judged} of {len(key.items)} items judged by {', '.join(judges)}; {judgements.median_seconds:.1f} s each "
        f"(median); {key.num_identical} examples with equal answers left out",
        "p: exact sign test without ties, of the tasks adjusted by Holm",
    ]
    if agreement is not None:
        method = "Cohen" if len(judges) == 2 else "Fleiss"
        kappa = "not defined (all chose the same)" if agreement.kappa is None else f"{agreement.kappa:.2f}"
        remarks.append(
            f"judges agree in {agreement.share:.0%} of {agreement.num_items} items that all judged; "
            f"kappa ({method}) {kappa}"
        )
    elif len(judges) > 1:
        remarks.append("no item was judged by all, so agreement is not known")
    return remarks


def _vote(item: BlindItem, choice: str) -> int:
    """-1 for the first strategy, 1 for the second."""
    if choice == "tie":
        return 0
    strategy = item.A if choice == "A" else 1 - item.A
    return 1 if strategy else -1


def _preference(margins: Sequence[int]) -> Preference:
    from scipy.stats import binomtest

    wins = (sum(margin < 0 for margin in margins), sum(margin > 0 for margin in margins))
    p = float(binomtest(wins[0], sum(wins)).pvalue) if any(wins) else 1.0
    return Preference(wins, len(margins) - sum(wins), p)


def _agreement(judges: Sequence[Mapping[str, str]]) -> Agreement | None:
    shared = sorted(set.intersection(*map(set, judges)))
    if len(judges) < 2 or not shared:
        return None
    counts_NC = np.array([[[own[item] for own in judges].count(choice) for choice in CHOICES] for item in shared])
    kappa = fleiss_kappa(counts_NC)
    if len(judges) == 2 and kappa is not None:
        from sklearn.metrics import cohen_kappa_score

        first, second = ([own[item] for item in shared] for own in judges)
        kappa = float(cohen_kappa_score(first, second, labels=CHOICES))
    return Agreement(len(shared), _agreeing_pairs(counts_NC), kappa)


def _agreeing_pairs(counts_NC: NDArray[Any]) -> float:
    num_judges = counts_NC[0].sum()
    pairs_N = (counts_NC * (counts_NC - 1)).sum(axis=1)
    return float(pairs_N.mean() / (num_judges * (num_judges - 1)))


def _read_key(path: Path) -> BlindKey:
    content = _read(path, "the blind_key.json that was written beside the page")
    try:
        first, second = content["strategies"]
        items = {name: BlindItem(**item) for name, item in content["items"].items()}
        return BlindKey(content["page"], (first, second), content["num_identical"], items)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: must be the key of a blind page, and is not: {error!r}; write the page again."
        ) from None


def _read_judge(path: Path, key: BlindKey, key_path: Path) -> _Judge:
    content = _read(path, "a file saved by the blind page")
    try:
        page, name, rows = content["page"], str(content["judge"]), content["judgements"]
        choices = {str(row["item"]): str(row["choice"]) for row in rows}
        seconds = [float(row["seconds"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: must be judgements, and is not: {error!r}; save them from the page again.") from None
    if page != key.page:
        raise UserError(
            f"{path}: must be of page {key.page}, as {key_path} is, and is of page {page}; name its own key."
        )
    if not choices:
        raise UserError(f"{path}: must hold judgements, and has none; judge an item and save again, or leave it out.")
    for item, choice in choices.items():
        if item not in key.items or choice not in CHOICES:
            raise UserError(
                f"{path}: item {item} must be on the page and its choice one of {', '.join(CHOICES)}, found "
                f"{choice!r}; save the judgements from the page again."
            )
    return _Judge(name, choices, seconds)


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: must be {what}, found: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path}: must be JSON, found: {error}; name {what}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, found {type(content).__name__}; name {what}.")
    return content
