"""What holds for every sampler, whatever it samples by."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import mtl.samplers
from mtl.interfaces import TaskFeedback, TaskSampler
from mtl.samplers import (
    Annealed,
    Curriculum,
    DoReMi,
    Equal,
    Exp3,
    Exp3S,
    Performance,
    Proportional,
    SkillIt,
    Specified,
    Temperature,
    UniMax,
)

Make = Callable[[int, int], TaskSampler]  # number of tasks, seed
NUM_STEPS = 60


def sizes(num_tasks: int) -> list[int]:
    return [int(size) for size in np.random.default_rng(num_tasks).integers(1, 10_000, num_tasks)]


FACTORIES: dict[str, Make] = {
    "annealed": lambda n, seed: Annealed(sizes(n), num_steps=NUM_STEPS, seed=seed),
    "curriculum": lambda n, seed: Curriculum(sizes(n), num_steps=NUM_STEPS, floor=0.1, seed=seed),
    "curriculum by schedule": lambda n, seed: Curriculum(
        sizes(n),
        num_steps=NUM_STEPS,
        schedule=[{"until": 0.3, "weights": range(1, n + 1)}, {"until": 1, "weights": [1] * n}],
        seed=seed,
    ),
    "doremi": lambda n, seed: DoReMi(sizes(n), references=[1.0] * n, average=False, smoothing=0.2, seed=seed),
    "doremi average": lambda n, seed: DoReMi(sizes(n), references=[1.0] * n, warmup=4, seed=seed),
    "equal": lambda n, seed: Equal(sizes(n), seed=seed),
    "exp3": lambda n, seed: Exp3(sizes(n), num_steps=NUM_STEPS, seed=seed),
    "exp3 gap_closed": lambda n, seed: Exp3(sizes(n), reward="gap_closed", gamma=0.5, smoothing=0.5, seed=seed),
    "exp3s": lambda n, seed: Exp3S(sizes(n), eta=0.1, reservoir_size=9, warmup=3, seed=seed),
    "exp3s gap_closed": lambda n, seed: Exp3S(sizes(n), reward="gap_closed", eta=0.5, beta=0.1, seed=seed),
    "performance gap": lambda n, seed: Performance(sizes(n), probability_smoothing=0.5, seed=seed),
    "performance loss_ratio": lambda n, seed: Performance(sizes(n), signal="loss_ratio", warmup=3, seed=seed),
    "performance progress": lambda n, seed: Performance(sizes(n), signal="progress", window=3, seed=seed),
    "proportional": lambda n, seed: Proportional(sizes(n), seed=seed),
    "skillit": lambda n, seed: SkillIt(sizes(n), matrix=np.eye(n) + 0.1, smoothing=0.3, seed=seed),
    "specified": lambda n, seed: Specified(sizes(n), probabilities=range(1, n + 1), seed=seed),
    "temperature": lambda n, seed: Temperature(sizes(n), seed=seed),
    "unimax": lambda n, seed: UniMax(sizes(n), num_steps=1_000, batch_size=16, seed=seed),
}
FIXED = {"equal", "proportional", "specified", "temperature", "unimax"}
SCHEDULED = {"annealed", "curriculum", "curriculum by schedule"}
LEARNING = set(FACTORIES) - FIXED - SCHEDULED
every_sampler = pytest.mark.parametrize("name", sorted(FACTORIES))
every_moving_sampler = pytest.mark.parametrize("name", sorted(set(FACTORIES) - FIXED))


def step_feedback(
    step: int, tasks: list[int], counts: list[int], before: list[float], after: list[float], **extra: Any
) -> TaskFeedback:
    losses, losses_after = (torch.tensor(values, dtype=torch.float64) for values in (before, after))
    return TaskFeedback(step, tasks, counts, losses, losses_after_M=losses_after, **extra)


def evaluation(step: int, results: dict[int, dict[str, float]]) -> TaskFeedback:
    return TaskFeedback(step, (), (), torch.empty(0, dtype=torch.float64), validation=results)


def run(sampler: TaskSampler, num_tasks: int, steps: range, seed: int = 7) -> Iterator[tuple[list[int], list[float]]]:
    """Trains with losses by chance, that depend on seed and step only; evaluations leave out a task, but the first."""
    for step in steps:
        generator = np.random.default_rng([seed, step])
        before, after, validation = generator.gamma(2.0, size=(3, num_tasks))
        scores = generator.random(num_tasks)
        if step % 10 == 0:
            results = {t: {"loss": validation[t], "score": scores[t]} for t in range(num_tasks) if step == 0 or t != 1}
            sampler.update(evaluation(step, results))
        counts = list(sampler.counts(5))
        yield counts, list(sampler.probabilities)
        tasks = [task for task in range(num_tasks) if counts[task] > 0]
        sampler.update(
            step_feedback(step, tasks, [counts[t] for t in tasks], before[tasks].tolist(), after[tasks].tolist())
        )


def as_saved(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state, allow_nan=False))


def test_no_sampler_is_left_out() -> None:
    made = {type(make(2, 0)).__name__ for make in FACTORIES.values()}
    assert made == set(mtl.samplers.__all__)


@pytest.mark.parametrize("num_tasks", [2, 9, 256])
@pytest.mark.parametrize("name", sorted({type(make(2, 0)).__name__: name for name, make in FACTORIES.items()}.values()))
def test_counts_stay_within_an_example_of_constant_probabilities(name: str, num_tasks: int) -> None:
    """At every draw, or at every tenth of many tasks."""
    sampler, num_drawn = FACTORIES[name](num_tasks, 3), 1 if num_tasks < 100 else 10
    counts = np.cumsum([sampler.counts(num_drawn) for _ in range(10_000 // num_drawn)], axis=0)
    expected = np.arange(num_drawn, 10_001, num_drawn)[:, None] * np.array(sampler.probabilities)
    assert np.abs(counts - expected).max() <= 1 - 1 / (2 * num_tasks - 2) + 1e-8


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 33])
@every_sampler
def test_probabilities_and_counts_add_up_however_training_goes(name: str, num_tasks: int) -> None:
    sampler, drawn, expected = FACTORIES[name](num_tasks, 0), np.zeros(num_tasks), np.zeros(num_tasks)
    for counts, probabilities in run(sampler, num_tasks, range(NUM_STEPS)):
        assert len(counts) == len(probabilities) == num_tasks
        assert sum(counts) == 5
        assert min(probabilities) >= 0
        assert sum(probabilities) == pytest.approx(1, abs=1e-12)
        drawn, expected = drawn + counts, expected + 5 * np.array(probabilities)
        assert np.abs(drawn - expected)[np.array(probabilities) > 0].max() < 2.5
    if num_tasks == 1:
        assert sampler.probabilities == (1.0,)


@every_moving_sampler
def test_probabilities_do_move(name: str) -> None:
    sampler = FACTORIES[name](5, 0)
    probabilities = np.array([p for _, p in run(sampler, 5, range(NUM_STEPS))])
    assert np.ptp(probabilities, axis=0).max() > 1e-3


@pytest.mark.parametrize("num_tasks", [1, 4])
@pytest.mark.parametrize("at", [0, 13, 20])
@every_sampler
def test_a_resumed_run_goes_on_bit_for_bit(name: str, at: int, num_tasks: int) -> None:
    whole, resumed = FACTORIES[name](num_tasks, 1), FACTORIES[name](num_tasks, 2)
    list(run(whole, num_tasks, range(at)))
    saved = as_saved(whole.state_dict())
    resumed.load_state_dict(copy.deepcopy(saved))
    assert resumed.probabilities == whole.probabilities
    assert getattr(resumed, "signals", None) == getattr(whole, "signals", None)
    assert list(run(whole, num_tasks, range(at, 45))) == list(run(resumed, num_tasks, range(at, 45)))
    assert as_saved(whole.state_dict()) == as_saved(resumed.state_dict())


@every_sampler
def test_state_is_a_snapshot(name: str) -> None:
    sampler = FACTORIES[name](4, 0)
    list(run(sampler, 4, range(15)))
    state = sampler.state_dict()
    before = copy.deepcopy(state)
    list(run(sampler, 4, range(15, 31)))
    assert state == before
    fresh = FACTORIES[name](4, 0)
    fresh.load_state_dict(state)
    list(run(fresh, 4, range(15, 31)))
    assert state == before


@every_sampler
def test_state_of_other_tasks_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must have the run's 3 tasks, found 2"):
        FACTORIES[name](3, 0).load_state_dict(FACTORIES[name](2, 0).state_dict())


@pytest.mark.parametrize("name", sorted(LEARNING))
def test_signals_say_what_moved_the_probabilities(name: str) -> None:
    sampler = FACTORIES[name](3, 0)
    assert sampler.signals == {}
    list(run(sampler, 3, range(25)))
    ((quantity, values),) = sampler.signals.items()
    assert quantity in {"excess_loss", "reward", "gap", "loss_ratio", "progress"}
    assert len(values) == 3
    assert all(value is None or isinstance(value, float) for value in values)


@every_sampler
def test_extreme_losses_leave_the_probabilities_finite(name: str) -> None:
    sampler = FACTORIES[name](4, 0)
    for step in range(40):
        value = (0.0, 1e-12, 5e-324, 1e6)[step % 4]
        sampler.update(step_feedback(step, [0, 2], [1, 3], [value, 1.0], [1.0, value]))
        results = {0: {"loss": value, "score": 1.0}, 2: {"loss": 1.0, "score": 0.0}, 3: {"loss": value}}
        sampler.update(evaluation(step + 1, results))
        assert np.isfinite(sampler.probabilities).all()
        assert sum(sampler.probabilities) == pytest.approx(1, abs=1e-12)
    assert sum(sampler.counts(16)) == 16


@every_sampler
def test_losses_that_are_not_finite_are_not_remembered(name: str) -> None:
    """The loop gives no update for a step with such a loss; losses after it and validation losses may be so."""
    sampler, same = FACTORIES[name](3, 0), FACTORIES[name](3, 0)
    for s in (sampler, same):
        list(run(s, 3, range(12)))
    for value in (float("nan"), float("inf")):
        sampler.update(evaluation(12, {0: {"loss": value}, 1: {"loss": value}}))
        sampler.update(step_feedback(13, [0, 1], [1, 1], [1.0, 2.0], [value, value]))
    list(run(sampler, 3, range(14, 40)))
    assert np.isfinite(sampler.probabilities).all()
    as_saved(sampler.state_dict())  # refuses NaN and infinity


@every_sampler
def test_the_global_generators_are_left_alone(name: str) -> None:
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    list(run(FACTORIES[name](3, 5), 3, range(20)))
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])
    assert torch.equal(torch_before, torch.get_rng_state())


# With the sizes given, and nothing that is by order of the tasks or by chance.
BY_SIZES: dict[str, Callable[..., TaskSampler]] = {
    "annealed": lambda sizes, **options: Annealed(sizes, num_steps=20, **options),
    "curriculum": lambda sizes, **options: Curriculum(sizes, num_steps=20, **options),
    "doremi": lambda sizes, **options: DoReMi(sizes, references=[0.2] * len(sizes), **options),
    "exp3": lambda sizes, **options: Exp3(sizes, gamma=0.3, **options),
    "exp3 gap_closed": lambda sizes, **options: Exp3(sizes, reward="gap_closed", gamma=0.3, **options),
    "exp3s": lambda sizes, **options: Exp3S(sizes, eta=0.1, **options),
    "exp3s gap_closed": lambda sizes, **options: Exp3S(sizes, reward="gap_closed", eta=0.1, **options),
    "performance gap": lambda sizes, **options: Performance(sizes, **options),
    "performance loss_ratio": lambda sizes, **options: Performance(sizes, signal="loss_ratio", **options),
    "performance progress": lambda sizes, **options: Performance(sizes, signal="progress", **options),
    "skillit": lambda sizes, **options: SkillIt(sizes, **options),
}


def losses_by_chance(step: int, order: list[int]) -> TaskFeedback:
    """A step with every task present, and every third time an evaluation."""
    num_tasks = len(order)
    before, after, validation, scores = np.random.default_rng(step).random((4, num_tasks))[:, order]
    results = {t: {"loss": validation[t], "score": scores[t]} for t in range(num_tasks)}
    counts = [1 + task for task in order]
    return step_feedback(
        step, list(range(num_tasks)), counts, before, after, validation=results if step % 3 == 0 else None
    )


@pytest.mark.parametrize("name", sorted(BY_SIZES))
def test_permuting_the_tasks_permutes_the_probabilities(name: str) -> None:
    order = [2, 0, 3, 1]
    straight = BY_SIZES[name]([10, 20, 40, 80])
    permuted = BY_SIZES[name]([40, 10, 80, 20])
    for step in range(30):
        straight.update(losses_by_chance(step, [0, 1, 2, 3]))
        permuted.update(losses_by_chance(step, order))
        np.testing.assert_allclose(np.array(straight.probabilities)[order], permuted.probabilities, rtol=1e-9)


@pytest.mark.parametrize("name", sorted(BY_SIZES.keys() - SCHEDULED))
def test_warmup_keeps_the_start_and_smoothing_slows_the_move(name: str) -> None:
    make, sizes = BY_SIZES[name], [10, 20, 40]
    smoothing = "probability_smoothing" if name.startswith("performance") else "smoothing"
    plain, warm, smooth = make(sizes), make(sizes, warmup=11), make(sizes, **{smoothing: 0.75})
    start = plain.probabilities
    for step in range(10):
        for sampler in (plain, warm, smooth):
            sampler.update(losses_by_chance(step, [0, 1, 2]))
        if plain.probabilities != start:
            break
    assert plain.probabilities != start
    np.testing.assert_allclose(smooth.probabilities, 0.75 * np.array(start) + 0.25 * np.array(plain.probabilities))
    for later in range(step + 1, 10):
        warm.update(losses_by_chance(later, [0, 1, 2]))
        assert warm.probabilities == start
    for later in range(10, 20):
        warm.update(losses_by_chance(later, [0, 1, 2]))
    assert warm.probabilities != start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"floor": 1.5}, r"^floor: must be a share in \[0, 1\], found 1.5; "),
        ({"floor": float("nan")}, r"^floor: must be a share in \[0, 1\], found nan; "),
        ({"warmup": -1}, r"^warmup: must be a number of steps, at least 0, found -1; "),
        ({"smoothing": 1.0}, r"^smoothing: must be in \[0, 1\), found 1.0; "),
    ],
)
def test_what_all_learning_samplers_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkillIt([1, 2], **arguments)
