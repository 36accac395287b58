"""What a comparison says, in sentences: which strategy is best, and where the data do not decide it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan

from mtl.report.comparison import Comparison, Interval, StrategyOutcome, Verdict
from mtl.report.stage_words import stage_sentences

MAX_NAMES = 5
AGGREGATES = {"mean": "the mean over the tasks", "worst": "the worst task"}


def sentences(comparison: Comparison) -> list[str]:
    """The findings, the most important first: a verdict on the mean and on the worst task, tasks hurt, failures."""
    found = [_verdict(verdict, comparison) for verdict in comparison.verdicts]
    if not comparison.verdicts:
        found.append(_alone(comparison.strategies[0], comparison))
    found += _hurt(comparison)
    found += stage_sentences([run for item in comparison.strategies for run in item.runs])
    if comparison.failures:
        number_failed = "1 job" if len(comparison.failures) == 1 else f"{len(comparison.failures)} jobs"
        found.append(f"Failed, and not in here: {number_failed}, {_listed(list(comparison.failures))}.")
    return found


def percent(value: float) -> str:
    """A relative change as one reads it: ``+1.2 %`` for .012."""
    return "unknown" if isnan(value) else f"{100 * value:+.1f} %"


def number(value: float, comparison: Comparison) -> str:
    """A mean or worst value: a relative change, or a score where there is no reference."""
    if comparison.reference_name:
        return percent(value)
    return "unknown" if isnan(value) else f"{value:.3f}"


def with_interval(interval: Interval, comparison: Comparison) -> str:
    """The value and its 95 % interval, if it has one."""
    if isnan(interval.low):
        return number(interval.value, comparison)
    low, high = number(interval.low, comparison), number(interval.high, comparison)
    return f"{number(interval.value, comparison)} [{low}, {high}]"


def _verdict(verdict: Verdict, comparison: Comparison) -> str:
    best = next(item for item in comparison.strategies if item.name == verdict.best)
    value = best.mean if verdict.aggregate == "mean" else best.worst
    what = AGGREGATES[verdict.aggregate]
    where = f" ({best.worst_task})" if verdict.aggregate == "worst" else ""
    against = f" against {comparison.reference_name}" if comparison.reference_name else ""
    found = f"{with_interval(value, comparison)}{against}{where}"
    open_names = [duel.other for duel in verdict.duels if not duel.decided]
    if not open_names:
        closest = min(verdict.duels, key=lambda duel: duel.difference.low)
        return (
            f"Best for {what}: {best.name}, {found}. The test examples tell it from every other strategy (closest: "
            f"{closest.other}, difference {with_interval(closest.difference, comparison)}){_seeds(verdict)}."
        )
    if len(open_names) == len(verdict.duels):
        return (
            f"Undecided for {what}: {best.name} is ahead, {found}, but the data do not tell it from any other strategy"
            f"{_seeds(verdict)}."
        )
    return (
        f"Not fully decided for {what}: {best.name} is ahead, {found}, and the data tell it from "
        f"{len(verdict.duels) - len(open_names)} of the {len(verdict.duels)} others, but not from {_listed(open_names)}"
        f"{_seeds(verdict)}."
    )


def _seeds(verdict: Verdict) -> str:
    """What the seeds add, which the examples alone can't say."""
    tested = [(duel.sign_flip_p, duel.num_seeds) for duel in verdict.duels if duel.sign_flip_p is not None]
    if not tested:
        shared = any(duel.num_seeds for duel in verdict.duels)
        return "; one seed says nothing of another" if shared else "; without a seed in common nothing is paired by it"
    known = [(p, num_seeds) for p, num_seeds in tested if not isnan(p)]
    if not known:
        return ""
    lowest, num_seeds = min(known)
    least = 2 / 2**num_seeds
    limit = f", and {num_seeds} seeds can't give less than {least:g}" if least > 0.05 else ""
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
        yield f"With {_listed(clean)}, no task is worse than {comparison.reference_name} by its whole interval."
    for item in comparison.strategies if len(hurt) <= MAX_NAMES else ():
        if tasks := hurt[item.name]:
            yield (
                f"{item.name} leaves {_listed(tasks)} worse than {comparison.reference_name} by the whole interval"
                f"{_adjusted(item, tasks)}."
            )
    everywhere = set.intersection(*map(set, hurt.values())) if hurt else set()
    if everywhere and len(hurt) > 1:
        yield f"Every strategy leaves {_listed(sorted(everywhere))} worse than {comparison.reference_name}."


def _adjusted(item: StrategyOutcome, tasks: Sequence[str]) -> str:
    """What is left of hurt tasks once their p is adjusted for the number of tasks; empty where that is all."""
    sure = [name for name in tasks if (item.tasks[name].p_adjusted or 0.0) < 0.05]
    if len(sure) == len(tasks):
        return ""
    return f"; adjusted for the number of tasks, p is below .05 in {_listed(sure) if sure else 'none of them'}"


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        return f"{', '.join(shown)} and {len(names) - MAX_NAMES} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
