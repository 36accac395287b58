"""From finished runs to a comparison: means over seeds and tasks, intervals, tests, ranks.

Shape suffixes: R resamples, S seeds of a strategy, T tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import erfc, inf, isnan, nan, sqrt
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from mtl.errors import UserError
from mtl.evaluation.resampling import higher_is_better
from mtl.evaluation.statistics import (
    REFERENCE_FLOOR,
    holm,
    mean_ranks,
    pareto_front,
    percentile_interval,
    sign_flip_p,
    two_sided_p,
)
from mtl.report.comparison import Comparison, Duel, Interval, StrategyOutcome, TaskOutcome, Verdict
from mtl.report.evidence import LOSS, TaskEvidence, gather_evidence
from mtl.report.pool import SEED, Pool, Reference, StrategyRuns
from mtl.report.runs import FinishedRun, FoundRuns
from mtl.reporting.results import Cost

Floats = NDArray[np.float64]
BEFORE = "before training"
MAX_ODD = 5  # strategies or tasks that a note names


def compare(found: FoundRuns, references: FoundRuns | None = None) -> Comparison:
    """Compares strategies over tasks and seeds.

    Args:
        found: Runs of the strategies. Single-task runs among them are taken as the reference where none is given.
        references: What changes are relative to: for each task the runs of one strategy, over any seeds.

    Raises:
        UserError: The runs can't be compared: other tasks, metrics or test examples, or a task without a reference or
            with several.
    """
    notes = [*found.notes, *(references.notes if references else [])]
    runs = [run for run in found.runs if run.only_task is None]
    alone = [run for run in found.runs if run.only_task is not None]
    if not runs:
        raise UserError("All runs are single-task runs, which are a reference. Name runs on several tasks to compare.")
    if references and alone:
        notes.append(f"--reference is given: {len(alone)} single-task runs beside the runs to compare are left out")
    reference_runs = references.runs if references else alone
    tasks = _same_tasks(runs)
    everything = [*runs, *(run for run in reference_runs if run.folder not in {other.folder for other in runs})]
    evidence = gather_evidence(everything, tasks, seed=SEED)
    base = {task.name: _base_score(runs[0], task) for task in evidence}
    reference = _reference(everything, reference_runs, tasks)
    if reference is None:
        if any(task.metric == LOSS for task in evidence):
            # Scores and losses have no mean in common.
            reference = Reference(BEFORE, {})
            notes.append("without --reference and with tasks that have only a loss, changes are against the base model")
        else:
            notes.append("without --reference there is no relative change; strategies are compared by their scores")
    if only_loss := [task.name for task in evidence if task.metric == LOSS]:
        notes.append(
            f"only a loss, and not by example: {', '.join(only_loss)}; so the mean and the worst task have no intervals"
        )
    pool = Pool(evidence, reference, base, [run.seed for run in everything])
    strategies = [
        StrategyRuns(name, {run.seed: everything.index(run) for run in sorted(own, key=lambda run: run.seed)}, pool)
        for name, own in _grouped(runs).items()
    ]
    outcomes = _outcomes(strategies, pool, runs)
    notes += [*_notes_on_seeds(strategies, reference), *_notes_on_models(everything), *_notes_on_floors(pool)]
    return Comparison(
        tasks=tasks,
        metrics={task.name: task.metric for task in evidence},
        base=base,
        reference={} if reference is None else {name: pool.reference_score(index) for index, name in enumerate(tasks)},
        reference_name=None if reference is None else reference.name,
        strategies=sorted(outcomes, key=lambda outcome: _nan_last(outcome.mean.value), reverse=True),
        verdicts=[
            _verdict("mean", strategies, lambda values: values.mean(axis=-1)),
            _verdict("worst", strategies, lambda values: values.min(axis=-1)),
        ]
        if len(strategies) > 1
        else [],
        notes=notes,
        failures=found.failures | (references.failures if references else {}),
    )


def _grouped(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(run.strategy, []).append(run)
    return groups


def _same_tasks(runs: Sequence[FinishedRun]) -> list[str]:
    first = runs[0]
    for run in runs:
        odd = sorted(set(run.results.tasks) ^ set(first.results.tasks))
        if odd:
            raise UserError(
                f"{run.folder} and {first.folder}: must have the same tasks, and only one of them has {odd[0]}. "
                "Compare runs with the same tasks; single-task runs are for --reference."
            )
    return list(first.results.tasks)


def _base_score(run: FinishedRun, task: TaskEvidence) -> float:
    score = run.results.tasks[task.name].base[task.metric]
    return nan if score is None else score


def _reference(
    everything: Sequence[FinishedRun], references: Sequence[FinishedRun], tasks: Sequence[str]
) -> Reference | None:
    if not references:
        return None
    chosen = {run.folder for run in references}
    by_seed = sorted(range(len(everything)), key=lambda place: everything[place].seed)  # as those of a strategy are
    places = {
        name: [i for i in by_seed if everything[i].folder in chosen and name in everything[i].results.tasks]
        for name in tasks
    }
    for name, own in places.items():
        several = list(dict.fromkeys(everything[place].strategy for place in own))
        if len(several) > 1:
            raise UserError(
                f"--reference: must have runs of one strategy for {name}, and has {several[0]} and {several[1]}. Name "
                "one of them."
            )
    missing = [name for name, found in places.items() if not found]
    if missing:
        raise UserError(
            f"--reference: must have a run of each task, and has none of {', '.join(missing)}. Run mtl train -m "
            "experiment=single_task on the same tasks."
        )
    single = all(run.only_task is not None for run in references)
    return Reference("single-task" if single else ", ".join(dict.fromkeys(run.strategy for run in references)), places)


def _outcomes(strategies: Sequence[StrategyRuns], pool: Pool, runs: Sequence[FinishedRun]) -> list[StrategyOutcome]:
    scores_AT = np.array(
        [[_mean_score(pool, index, strategy) for index in range(pool.num_tasks)] for strategy in strategies]
    )
    better_T = [higher_is_better(task.metric) for task in pool.tasks]
    ranks = mean_ranks(scores_AT, better_T)
    values_AT = np.array([strategy.values_T(list(strategy.places)) for strategy in strategies])
    front = pareto_front(np.stack([values_AT.mean(axis=1), values_AT.min(axis=1)], axis=1))
    groups = _grouped(runs)
    outcomes = []
    for place, strategy in enumerate(strategies):
        seeds, values_T = list(strategy.places), values_AT[place]
        resampled_RT = strategy.resampled_RT(seeds)
        own = sorted(groups[strategy.name], key=lambda run: run.seed)
        outcomes.append(
            StrategyOutcome(
                name=strategy.name,
                runs=own,
                tasks=_task_outcomes(strategy, pool, own, resampled_RT),
                mean=_interval(values_T.mean(), resampled_RT.mean(axis=1)),
                worst=_interval(values_T.min(), resampled_RT.min(axis=1)),
                worst_task=pool.tasks[int(values_T.argmin())].name,
                per_seed_mean={seed: float(strategy.values_T([seed]).mean()) for seed in seeds},
                mean_rank=float(ranks[place]),
                cost=_mean_cost([run.results.cost for run in own]),
                on_pareto_front=bool(front[place]),
            )
        )
    return outcomes


def _mean_score(pool: Pool, index: int, strategy: StrategyRuns) -> float:
    return float(pool.tasks[index].scores[list(strategy.places.values())].mean())


def _task_outcomes(
    strategy: StrategyRuns, pool: Pool, runs: Sequence[FinishedRun], changes_RT: Floats
) -> dict[str, TaskOutcome]:
    seeds, places = list(strategy.places), list(strategy.places.values())
    compared = pool.reference is not None
    outcomes, p_values = {}, []
    for index, task in enumerate(pool.tasks):
        score, scores_R = _mean_score(pool, index, strategy), pool.resampled_score(index, places, seeds)
        results = [run.results.tasks[task.name] for run in runs]
        difference = change = None
        if compared:
            reference, reference_R = pool.reference_score(index), pool.resampled_reference(index)
            difference = _interval(score - reference, scores_R - reference_R)
            change = _interval(strategy.values_T(seeds)[index], changes_RT[:, index])
            p_values.append(_p(scores_R - reference_R))
        outcomes[task.name] = TaskOutcome(
            score=_interval(score, scores_R),
            per_seed={seed: float(task.scores[place]) for seed, place in strategy.places.items()},
            loss=fmean(nan if item.test["loss"] is None else item.test["loss"] for item in results),
            change=change,
            difference=difference,
            p_adjusted=None,
            epochs_seen=fmean(item.epochs_seen for item in results),
            examples_seen=fmean(item.examples_seen for item in results),
        )
    if not compared:
        return outcomes
    adjusted = holm(p_values).tolist()
    return {name: replace(outcome, p_adjusted=p) for (name, outcome), p in zip(outcomes.items(), adjusted, strict=True)}


def _verdict(aggregate: str, strategies: Sequence[StrategyRuns], over_tasks: Callable[[Floats], Floats]) -> Verdict:
    """The strategy with the highest aggregate against every other, over the seeds that both have."""

    def value(strategy: StrategyRuns, seeds: Sequence[int]) -> float:
        return float(over_tasks(strategy.values_T(seeds)))

    best = max(strategies, key=lambda strategy: _nan_last(value(strategy, list(strategy.places))))
    duels, p_values = [], []
    for other in strategies:
        if other is best:
            continue
        common = [seed for seed in best.places if seed in other.places]
        # Without a seed in common there is no pairing; each is resampled over its own.
        own, theirs = (common, common) if common else (list(best.places), list(other.places))
        difference_R = over_tasks(best.resampled_RT(own)) - over_tasks(other.resampled_RT(theirs))
        p_values.append(_p(difference_R))
        per_seed = [value(best, [seed]) - value(other, [seed]) for seed in common]
        duels.append(
            Duel(
                other=other.name,
                difference=_interval(value(best, own) - value(other, theirs), difference_R),
                p_adjusted=nan,
                sign_flip_p=sign_flip_p(per_seed, np.random.default_rng(SEED)) if len(common) > 1 else None,
                num_seeds=len(common),
            )
        )
    adjusted = holm(p_values).tolist()
    return Verdict(aggregate, best.name, [replace(duel, p_adjusted=p) for duel, p in zip(duels, adjusted, strict=True)])


def _p(differences_R: Floats) -> float:
    """The bootstrap's p; where no resample is on the other side of 0, the normal tail beyond, if that is smaller.

    Of 999 resamples p is at least .002, which Holm's factor takes above .05 from 26 strategies on, however far they are
    apart.
    """
    p = two_sided_p(differences_R)
    spread = float(differences_R.std())
    if not p <= 2 / (len(differences_R) + 1) or spread == 0:
        return p
    return min(p, erfc(abs(float(differences_R.mean())) / spread / sqrt(2)))


def _nan_last(value: float) -> float:
    return -inf if isnan(value) else value


def _interval(value: float, values_R: Floats) -> Interval:
    low, high = percentile_interval(values_R)
    return Interval(float(value), low, high)


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    speeds = [cost.tokens_per_second for cost in costs if cost.tokens_per_second is not None]
    peaks = [cost.peak_memory_bytes for cost in costs if cost.peak_memory_bytes is not None]
    return Cost(
        steps=round(fmean(cost.steps for cost in costs)),
        tokens=round(fmean(cost.tokens for cost in costs)),
        target_tokens=round(fmean(cost.target_tokens for cost in costs)),
        seconds=fmean(cost.seconds for cost in costs),
        tokens_per_second=fmean(speeds) if speeds else None,
        peak_memory_bytes=max(peaks) if peaks else None,
    )


def _notes_on_seeds(strategies: Sequence[StrategyRuns], reference: Reference | None) -> list[str]:
    seeds = {strategy.name: list(strategy.places) for strategy in strategies}
    notes = []
    fewest = min(map(len, seeds.values()))
    if fewest == 1:
        notes.append("with one seed, intervals say nothing of how another seed would have turned out")
    elif fewest < 6:
        notes.append(
            f"with {fewest} seeds the exact sign-flip test can't give a p below {2 / 2**fewest:g}; only 6 reach .05"
        )
    if reference and reference.places and fewest > 1 and min(map(len, reference.places.values())) == 1:
        notes.append(f"{reference.name} has one seed: its own spread over seeds is in no interval")
    if len({tuple(own) for own in seeds.values()}) > 1:
        common = Counter(map(tuple, seeds.values())).most_common(1)[0][0]
        odd = [f"{name} has {_listed(own)}" for name, own in seeds.items() if tuple(own) != common]
        more = f" and {len(odd) - MAX_ODD} more differ" if len(odd) > MAX_ODD else ""
        notes.append(
            f"not all strategies have the seeds {_listed(common)}: {'; '.join(odd[:MAX_ODD])}{more}; pairs are "
            "compared over the seeds they share"
        )
    return notes


def _notes_on_floors(pool: Pool) -> Iterator[str]:
    low = [
        f"{task.name} ({score:.3f})"
        for index, task in enumerate(pool.tasks)
        if abs(score := pool.reference_score(index)) < REFERENCE_FLOOR
    ]
    if low:
        more = f" and {len(low) - MAX_ODD} more" if len(low) > MAX_ODD else ""
        yield (
            f"the reference is below {REFERENCE_FLOOR} in {', '.join(low[:MAX_ODD])}{more}: changes are divided by "
            f"{REFERENCE_FLOOR} there, and may dominate the mean"
        )


def _notes_on_models(runs: Sequence[FinishedRun]) -> list[str]:
    models = list(dict.fromkeys(run.results.model for run in runs))
    if len(models) == 1:
        return []
    return [
        f"the runs are of several models, {', '.join(models)}: the scores before training are those of {models[0]}, "
        "and losses per token compare only where the tokenizer is the same"
    ]


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
