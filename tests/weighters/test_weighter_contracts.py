"""What every loss weighter keeps, whatever its method. Shape suffixes: T tasks, M present tasks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtl.weighters
from mtl.interfaces import LossWeighter, TaskFeedback

NUM_TASKS = 5
PROVIDED = {"losses", "losses_after", "gramian", "validation", "scores"}
RANDOM = {"RLW"}
FIXED = {"Equal", "Static"}
# The weights of all T tasks follow from the state of all, so their mean of 1 moves those of absent tasks too, and of
# tasks that have never been there.
NORMALISED_OVER_ALL = {"IMTLL", "LiebelKoerner", "Uncertainty"}
# As these, except that tasks without two windows keep a weight of 1.
ABSENT_WEIGHT_MOVES = NORMALISED_OVER_ALL | RANDOM | {"DWA"}


def weighter_of(name: str, num_tasks: int = NUM_TASKS, seed: int = 3) -> LossWeighter:
    supplied = {
        "num_tasks": num_tasks,
        "names": [f"task {task}" for task in range(num_tasks)],
        "sizes": [100] * num_tasks,
        "seed": seed,
        "num_steps": 200,
        "weights": {},
        "references": 0.2,
    }
    factory = getattr(mtl.weighters, name)
    weighter: LossWeighter = factory(
        **{key: supplied[key] for key in inspect.signature(factory).parameters if key in supplied}
    )
    return weighter


def steps_of(
    num_steps: int, among: Sequence[int] = range(NUM_TASKS), *, seed: int = 0, always: bool = False
) -> Iterator[TaskFeedback]:
    """Evaluation before training, then steps with random tasks, losses that fall at different rates, and gradients.

    Every tenth step is followed by an evaluation of the tasks that may be present.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    yield evaluation(0, {task: {"loss": 1.0 + 0.3 * task, "score": 0.2 + 0.1 * task} for task in among})
    for step in range(num_steps):
        draws_T = uniform(NUM_TASKS)
        tasks = [task for task in among if always or draws_T[task] < 0.6]
        fall_T = 0.999 ** (step * (1 + torch.arange(NUM_TASKS, dtype=torch.float64)))
        losses_M = ((0.3 + 2 * uniform(NUM_TASKS)) * fall_T)[tasks]
        rows_MN = uniform(len(tasks), 7) - 0.4
        yield TaskFeedback(
            step=step,
            tasks=tasks,
            counts_M=[1 + (step + task) % 3 for task in tasks],
            losses_M=losses_M,
            losses_after_M=losses_M * (0.9 + 0.15 * uniform(len(tasks))),
            gramian_MM=rows_MN @ rows_MN.T,
        )
        if step % 10 == 9:
            scores = zip(among, uniform(len(among), 2).tolist(), strict=True)
            yield evaluation(step, {task: {"loss": 0.2 + loss, "score": score} for task, (loss, score) in scores})


def evaluation(step: int, results: dict[int, dict[str, float]]) -> TaskFeedback:
    return TaskFeedback(step, (), (), torch.zeros(0, dtype=torch.float64), validation=results)


def take(weighter: LossWeighter, feedback: TaskFeedback) -> Tensor:
    """One step as the loop takes it, with no more than the weighter declares that it needs; returns its weights."""
    needs = weighter.needs
    if not feedback.tasks:
        if "validation" in needs:
            weighter.update(feedback)
        return weighter.weights(None)
    before = replace(feedback, losses_after_M=None, gramian_MM=feedback.gramian_MM if "gramian" in needs else None)
    weights_T = weighter.weights(before if needs & {"losses", "gramian"} else None)
    weighter.update(replace(before, losses_after_M=feedback.losses_after_M if "losses_after" in needs else None))
    return weights_T


def trained(name: str, num_steps: int = 30) -> LossWeighter:
    weighter = weighter_of(name)
    for feedback in steps_of(num_steps):
        take(weighter, feedback)
    return weighter


def frozen(state: Any) -> Any:
    """The state as something whose equality is that of the bits."""
    if isinstance(state, Tensor):
        return str(state.dtype), tuple(state.shape), state.numpy().tobytes()
    if isinstance(state, dict):
        return {key: frozen(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [frozen(value) for value in state]
    return repr(state)


def part_of(state: Any, task: int) -> Any:
    """What of the state is about one task: its entry wherever there is one for each."""
    if isinstance(state, dict):
        return {key: part_of(value, task) for key, value in state.items()}
    if isinstance(state, Tensor | list) and len(state) == NUM_TASKS:
        return frozen(state[task])
    return None


every_weighter = pytest.mark.parametrize("name", mtl.weighters.__all__)


@every_weighter
def test_needs_are_what_the_loop_provides(name: str) -> None:
    assert isinstance(weighter_of(name).needs, frozenset)
    assert weighter_of(name).needs <= PROVIDED


@every_weighter
def test_weights_are_finite_float64_with_mean_1(name: str) -> None:
    weighter = weighter_of(name)
    rows = [take(weighter, feedback) for feedback in steps_of(120)]
    for weights_T in rows:
        assert weights_T.dtype == torch.float64 and weights_T.shape == (NUM_TASKS,)
        assert not weights_T.requires_grad and weights_T.device.type == "cpu"
        assert weights_T.isfinite().all() and (weights_T >= 0).all()
        assert float(weights_T.mean()) == pytest.approx(1, abs=1e-12)
    assert torch.equal(rows[0], rows[-1]) == (name in FIXED)


@every_weighter
def test_weights_change_nothing_and_are_the_callers_own(name: str) -> None:
    weighter = trained(name)
    state = frozen(weighter.state_dict())
    for feedback in [None, *list(steps_of(4, seed=1))[1:]]:
        first_T = weighter.weights(feedback)
        expected = frozen(first_T)
        first_T.mul_(7)
        assert frozen(weighter.weights(feedback)) == expected
        assert frozen(weighter.state_dict()) == state


@every_weighter
def test_absent_tasks_stay_bitwise_as_they_are(name: str) -> None:
    weighter, absent, present = trained(name), [1, 3], [0, 2, 4]
    weights_T, state = weighter.weights(None), weighter.state_dict()
    before = [frozen(part_of(state, task)) for task in absent]
    for feedback in steps_of(50, among=present, seed=2):
        step_T = take(weighter, feedback)
        if name not in ABSENT_WEIGHT_MOVES:
            assert torch.equal(step_T[absent], weights_T[absent])
    if name not in RANDOM:  # their state is about no task
        assert [frozen(part_of(weighter.state_dict(), task)) for task in absent] == before


@every_weighter
def test_a_task_never_seen_has_weight_1(name: str) -> None:
    weighter = weighter_of(name)
    for feedback in steps_of(120, among=[0, 1, 3]):
        weights_T = take(weighter, feedback)
        if name not in NORMALISED_OVER_ALL | RANDOM:
            assert weights_T[[2, 4]].tolist() == [1, 1]


@every_weighter
def test_feedback_without_tasks_is_harmless(name: str) -> None:
    weighter = trained(name)
    weights, state = frozen(weighter.weights(None)), frozen(weighter.state_dict())
    weighter.update(evaluation(40, {}))
    assert (frozen(weighter.weights(None)), frozen(weighter.state_dict())) == (weights, state)
    everything = evaluation(41, {task: {"loss": 0.1 * task, "score": 0.5} for task in range(NUM_TASKS)})
    weighter.update(everything)
    if "validation" not in weighter.needs:
        assert frozen(weighter.weights(None)) == weights


@every_weighter
def test_state_round_trips_bitwise(name: str) -> None:
    steps = list(steps_of(100, seed=4))
    weighter, resumed = weighter_of(name), weighter_of(name, seed=8)
    for feedback in steps[:60]:
        take(weighter, feedback)
    saved = weighter.state_dict()
    json.dumps(saved, default=lambda value: value.tolist() if isinstance(value, Tensor) else pytest.fail(repr(value)))
    expected = frozen(saved)
    resumed.load_state_dict(saved)
    for feedback in steps[60:]:
        assert frozen(take(resumed, feedback)) == frozen(take(weighter, feedback))
    assert frozen(resumed.state_dict()) == frozen(weighter.state_dict())
    assert frozen(saved) == expected  # neither object went on in the saved one


@every_weighter
def test_one_task_has_weight_1(name: str) -> None:
    weighter = weighter_of(name, num_tasks=1)
    for feedback in steps_of(60, among=[0]):
        assert take(weighter, feedback).tolist() == [1.0]


@every_weighter
def test_equal_tasks_keep_equal_weights(name: str) -> None:
    if name in RANDOM:
        return
    weighter = weighter_of(name)
    for feedback in steps_of(60, always=True):
        same = replace(
            feedback,
            counts_M=[2] * len(feedback.tasks),
            losses_M=feedback.losses_M[:1].expand(len(feedback.tasks)),
            losses_after_M=None if feedback.losses_after_M is None else feedback.losses_after_M[:1].expand(NUM_TASKS),
            gramian_MM=None if feedback.gramian_MM is None else 0.5 + 0.5 * torch.eye(NUM_TASKS, dtype=torch.float64),
            validation=feedback.validation and dict.fromkeys(range(NUM_TASKS), feedback.validation[0]),
        )
        torch.testing.assert_close(take(weighter, same), torch.ones(NUM_TASKS, dtype=torch.float64), rtol=0, atol=1e-9)


@every_weighter
def test_order_of_the_tasks_does_not_matter(name: str) -> None:
    if name in RANDOM:
        return
    places = [3, 0, 4, 1, 2]  # where each task goes
    weighter, permuted = weighter_of(name), weighter_of(name)
    for feedback in steps_of(100, seed=5):
        expected_T = take(weighter, feedback)
        found_T = take(permuted, moved(feedback, places))
        torch.testing.assert_close(found_T[places], expected_T, rtol=1e-8, atol=1e-10)


def moved(feedback: TaskFeedback, places: Sequence[int]) -> TaskFeedback:
    order = sorted(range(len(feedback.tasks)), key=lambda row: places[feedback.tasks[row]])
    return replace(
        feedback,
        tasks=[places[feedback.tasks[row]] for row in order],
        counts_M=[feedback.counts_M[row] for row in order],
        losses_M=feedback.losses_M[order],
        losses_after_M=None if feedback.losses_after_M is None else feedback.losses_after_M[order],
        gramian_MM=None if feedback.gramian_MM is None else feedback.gramian_MM[order][:, order],
        validation=feedback.validation and {places[task]: result for task, result in feedback.validation.items()},
    )
