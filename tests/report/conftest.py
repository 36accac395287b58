"""Folders as finished runs leave them, and comparisons, made up: no model, no training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from mtl.evaluation.metrics import score_answers
from mtl.evaluation.results import Prediction
from mtl.report.comparison import Comparison, Duel, Interval, StrategyOutcome, TaskOutcome, Verdict
from mtl.report.runs import FinishedRun
from mtl.reporting.records import step_record
from mtl.reporting.results import Cost, Results, TaskResult, write_predictions, write_results

TASKS = {"sentiment": "accuracy", "inflect": "exact_match", "translate": "chrf", "notes": None}
WORDS = ["the", "cat", "sat", "mat", "two", "dogs", "watched", "from", "house", "old", "river", "boat", "rain", "sun"]


def write_run(
    folder: Path,
    strategy: str = "equal",
    seed: int = 0,
    *,
    tasks: dict[str, str | None] = TASKS,
    skill: float | dict[str, float] = 0.6,
    num_examples: int = 20,
    num_steps: int = 30,
    eval_every: int = 10,
    conflict_every: int | None = None,
    scored: bool = False,
    only_task: str | None = None,
) -> Path:
    """Writes the folder ``<strategy>,seed=<seed>`` of a run and returns it.

    Args:
        folder: Where to.
        strategy: Of the run; part of its config and of its folder's name.
        seed: Decides, with the strategy, what is random here.
        tasks: Names and metrics.
        skill: Chance of a right answer, for all tasks or for each.
        num_examples: Test examples of each task.
        num_steps: Steps that are logged.
        eval_every: Steps between evaluations; there is one before training.
        conflict_every: Steps between measurements of conflict.
        scored: Whether evaluations have scores.
        only_task: The task of a single-task run.
    """
    rng = random.Random(f"{strategy} {seed}")
    path = folder / f"{strategy},seed={seed}"
    path.mkdir(parents=True)
    tasks = {only_task: tasks[only_task]} if only_task else tasks
    skills = skill if isinstance(skill, dict) else dict.fromkeys(tasks, skill)
    config = {
        "seed": seed,
        "only_task": only_task,
        "surgery": {"_target_": f"mtl.surgery.{strategy}"},
        "tasks": dict(tasks),
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    results = {name: _result(path, name, metric, skills[name], num_examples, rng) for name, metric in tasks.items()}
    cost = Cost(num_steps, 1000 * num_steps, 200 * num_steps, 2.5 * num_steps, 400.0, 10**9)
    write_results(path / "results.json", Results({}, seed, "made up", results, cost))
    with (path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for record in _records(tasks, num_steps, eval_every, conflict_every, scored, rng):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def _result(path, name, metric, skill, num_examples, rng):
    loss = 2 - skill + rng.uniform(-0.05, 0.05)
    base, test = {"loss": 2.5}, {"loss": loss, "num_examples": num_examples}
    if metric:
        predictions = [_prediction(name, metric, index, skill, rng) for index in range(num_examples)]
        scores = score_answers(metric, [p.answer for p in predictions], [p.reference for p in predictions])
        own = {key: scores.corpus[key] for key in scores.corpus}
        predictions = [
            Prediction(**(prediction.__dict__ | {"score": score}))
            for prediction, score in zip(predictions, scores.per_example, strict=True)
        ]
        write_predictions(path / "predictions", name, predictions)
        base, test = dict.fromkeys(own, 0.2) | base, own | test
    epochs = rng.uniform(0.1, 4)
    return TaskResult(metric, base, {"loss": loss}, test, round(epochs * 100), epochs, round(epochs * 1000))


def _prediction(name, metric, index, skill, rng):
    """The question is the example's own, the answer the run's."""
    words = random.Random(f"{name} {index}")
    reference = words.choice(["yes", "no"]) if metric == "accuracy" else " ".join(words.choices(WORDS, k=6))
    wrong = {"yes": "no", "no": "yes"}.get(reference, " ".join(rng.choices(WORDS, k=6)))
    answer = reference if rng.random() < skill else wrong
    return Prediction(
        prompt=f"{name} {index}: <b>what?</b>",
        reference=reference,
        prediction=answer,
        answer=answer,
        score=0.0,
        location=f"test.jsonl:{index + 1}",
        loss=rng.uniform(0.5, 9.0),
        num_targets=6,
        complete=rng.random() < 0.9,
    )


def _records(tasks, num_steps, eval_every, conflict_every, scored, rng):
    names = list(tasks)
    weights = [1 + rng.uniform(-0.5, 0.5) for _ in names]
    for step in range(num_steps + 1):
        progress = step / max(num_steps, 1)
        if step:
            yield _step(names, step, progress, weights, conflict_every, rng)
        if step % eval_every == 0:
            losses = {name: 1 + 1.5 * (1 - progress) + rng.uniform(-0.05, 0.05) for name in names}
            evaluation = {
                name: ({metric: min(1.0, 0.2 + 0.5 * progress)} if scored and metric else {}) | {"loss": losses[name]}
                for name, metric in tasks.items()
            }
            yield {"step": step, "stage": "joint", "eval": evaluation, "mean": {"loss_ratio": 1.0}}


def _step(names, step, progress, weights, conflict_every, rng):
    size = len(names)
    raw = [1 + progress * index for index in range(size)]
    conflict = None
    if conflict_every and step % conflict_every == 0:
        noise = [[rng.gauss(0.1 * (row - column) / size, 0.05) for column in range(size)] for row in range(size)]
        conflict = (
            names,
            [
                [0.3 if row == column else (noise[row][column] + noise[column][row]) / 2 for column in range(size)]
                for row in range(size)
            ],
        )
    return step_record(
        names,
        step=step,
        stage="joint",
        tasks=range(size),
        counts_M=[2] * size,
        losses_M=[2.0] * size,
        shares_M=[1 / size] * size,
        probabilities_T=[value / sum(raw) for value in raw],
        weights_T=[1 + progress * (weight - 1) for weight in weights],
        coefficients_M=[rng.uniform(0.5, 1.5) / size for _ in names],
        objective=2.0,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens=1000,
        target_tokens=200,
        conflict=conflict,
    )


def made_comparison(
    changes: dict[str, dict[str, float]],
    *,
    compared: bool = True,
    half_width: float = 0.05,
    seeds: tuple[int, ...] = (0, 1, 2),
    folder: Path = Path("nowhere"),
    notes: tuple[str, ...] = (),
    failures: dict[str, str] | None = None,
) -> Comparison:
    """A comparison without runs: each strategy's change in each task, with intervals of one width.

    Args:
        changes: By strategy and task, the best mean first; scores are .5 times 1 + change.
        compared: Whether there is a reference.
        half_width: Of all intervals; NaN where there can be none.
        seeds: Of each strategy; all have the same numbers.
        folder: Where the runs would lie, as ``<strategy>,seed=<seed>``.
        notes: Of the comparison.
        failures: Jobs that failed.
    """

    def interval(value):
        return Interval(value, value - half_width, value + half_width)

    def task(change):
        score = 0.5 * (1 + change)
        own = interval(change) if compared else None
        return TaskOutcome(
            interval(score), dict.fromkeys(seeds, score), 1.5, own, own, 0.02 if compared else None, 1.2, 120
        )

    def value(outcome):
        return outcome.change.value if compared else outcome.score.value

    cost = Cost(30, 30_000, 6_000, 75.0, 400.0, 10**9)
    outcomes = {name: {key: task(change) for key, change in own.items()} for name, own in changes.items()}
    points = {name: (fmean(map(value, own.values())), min(map(value, own.values()))) for name, own in outcomes.items()}
    strategies = [
        StrategyOutcome(
            name=name,
            runs=[
                FinishedRun(folder / f"{name},seed={seed}", Results({}, seed, "made up", {}, cost), {}, name)
                for seed in seeds
            ],
            tasks=own,
            mean=interval(points[name][0]),
            worst=interval(points[name][1]),
            worst_task=min(own, key=lambda key: value(own[key])),
            per_seed_mean=dict.fromkeys(seeds, points[name][0]),
            mean_rank=1.5,
            cost=cost,
            on_pareto_front=not any(
                other != points[name] and other[0] >= points[name][0] and other[1] >= points[name][1]
                for other in points.values()
            ),
        )
        for name, own in outcomes.items()
    ]
    first, *others = strategies
    duels = [Duel(item.name, interval(first.mean.value - item.mean.value), 0.04, 0.25, len(seeds)) for item in others]
    tasks = list(first.tasks)
    return Comparison(
        tasks=tasks,
        metrics=dict.fromkeys(tasks, "accuracy"),
        base=dict.fromkeys(tasks, 0.25),
        reference=dict.fromkeys(tasks, 0.5) if compared else {},
        reference_name="single-task" if compared else None,
        strategies=strategies,
        verdicts=[Verdict("mean", first.name, duels)] if duels else [],
        notes=notes,
        failures=failures or {},
    )


@pytest.fixture
def make_comparison():
    """:func:`made_comparison`."""
    return made_comparison


@pytest.fixture
def make_run(tmp_path):
    """:func:`write_run` into ``runs`` below the test's folder, or into ``folder``."""

    def make(strategy="equal", seed=0, *, folder=None, **options):
        return write_run(folder or tmp_path / "runs", strategy, seed, **options)

    return make
