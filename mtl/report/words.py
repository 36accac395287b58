"""What a comparison says, in sentences: which strategy is best, and where the data do not decide it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtl.report.comparison import Comparison, Interval, StrategyOutcome, Verdict

MAX_NAMES = 5
AGGREGATES = {"mean": "the mean over the tasks", "worst": "the worst task"}


def sentences(comparison: Comparison) -> list[str]:
    """The findings, the most important first."""
    found = [_verdict(verdict, comparison) for verdict in comparison.verdicts]
    if not comparison.verdicts:
        found.append(_alone(comparison.strategies[0], comparison))
    found += _hurt(comparison)
    if comparison.failures:
        found.append(
            f"{len(comparison.failures)} jobs failed and are not in here: {_listed(list(comparison.failures))}."
        )
    return found


def percent(value: float) -> str:
    """A relative change as one reads it."""
    return f"{100 * value:+.1f} %"


def number(value: float, comparison: Comparison) -> str:
    """A mean or worst value: a relative change, or a score where there is no reference."""
    return percent(value) if comparison.reference_name else f"{value:.3f}"


def with_interval(interval: Interval, comparison: Comparison) -> str:
    """The value and its 95 % interval."""
    low, high = number(interval.low, comparison), number(interval.high, comparison)
    return f"{number(interval.value, comparison)} [{low}, {high}]"


def _verdict(verdict: Verdict, comparison: Comparison) -> str:
    best = next(item for item in comparison.strategies if item.name == verdict.best)
    value = best.mean if verdict.aggregate == "mean" else best.worst
    what = AGGREGATES[verdict.aggregate]
    where = f", {best.worst_task}," if verdict.aggregate == "worst" else ""
    against = f" against {comparison.reference_name}" if comparison.reference_name else ""
    open_names = [duel.other for duel in verdict.duels if not duel.decided]
    start = f"For {what}{where} {best.name} has the highest value, {with_interval(value, comparison)}{against}"
    if not open_names:
        closest = min(verdict.duels, key=lambda duel: duel.difference.low)
        return (
            f"{start}, and the test examples tell it from every other strategy (closest: {closest.other}, difference "
            f"{with_interval(closest.difference, comparison)}){_seeds(verdict)}."
        )
    if len(open_names) == len(verdict.duels):
        return f"{start}, but the data do not decide it: no other strategy is told from it{_seeds(verdict)}."
    return (
        f"{start}, but the data do not tell it from {_listed(open_names)}; it is ahead of the other "
        f"{len(verdict.duels) - len(open_names)}{_seeds(verdict)}."
    )


def _seeds(verdict: Verdict) -> str:
    """What the seeds add, which the examples alone can't say."""
    tested = [duel for duel in verdict.duels if duel.sign_flip_p is not None]
    if not tested:
        return "; one seed says nothing of another"
    lowest = min(duel.sign_flip_p or 1.0 for duel in tested)
    fewest = min(duel.num_seeds for duel in tested)
    least = 2 / 2**fewest
    limit = f", and {fewest} seeds can't give less than {least:g}" if least > 0.05 else ""
    return f"; over the seeds the lowest sign-flip p is {lowest:.3g}{limit}"


def _alone(strategy: StrategyOutcome, comparison: Comparison) -> str:
    against = f" against {comparison.reference_name}" if comparison.reference_name else ""
    return (
        f"{strategy.name}: mean over the tasks {with_interval(strategy.mean, comparison)}{against}, worst task "
        f"{strategy.worst_task} {with_interval(strategy.worst, comparison)}."
    )


def _hurt(comparison: Comparison) -> Iterator[str]:
    if comparison.reference_name is None:
        return
    hurt = {item.name: [name for name, task in item.tasks.items() if task.hurt] for item in comparison.strategies}
    clean = [name for name, tasks in hurt.items() if not tasks]
    if clean:
        yield f"No task is surely worse than {comparison.reference_name} with {_listed(clean)}."
    for name, tasks in hurt.items():
        if tasks and len(hurt) <= MAX_NAMES:
            yield f"{name} leaves {_listed(tasks)} worse than {comparison.reference_name}, with the whole interval."
    everywhere = set.intersection(*map(set, hurt.values())) if hurt else set()
    if everywhere and len(hurt) > 1:
        yield f"Every strategy leaves {_listed(sorted(everywhere))} worse than {comparison.reference_name}."


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        return f"{', '.join(shown)} and {len(names) - MAX_NAMES} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
