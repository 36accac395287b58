from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.samplers import Curriculum

SIZES = [10, 20, 30]
NAMES = ["a", "情感", "c"]
STEP = TaskFeedback(0, [0], [4], torch.ones(1))


def evaluated(losses: dict[int, float]) -> TaskFeedback:
    return TaskFeedback(0, [], [], torch.empty(0), validation={task: {"loss": loss} for task, loss in losses.items()})


def plan(sampler: Curriculum, num_steps: int) -> np.ndarray:
    """The probabilities that each step is drawn with."""
    rows = []
    for _ in range(num_steps):
        rows.append(sampler.probabilities)
        sampler.update(STEP)
    return np.array(rows)


def test_one_task_at_a_time() -> None:
    sampler = Curriculum(SIZES, num_steps=9, names=NAMES, order=["c", "a", "情感"], overlap=0.0)
    assert plan(sampler, 9).argmax(axis=1).tolist() == [2, 2, 2, 0, 0, 0, 1, 1, 1]
    assert sampler.counts(5) == [0, 5, 0]  # beyond the end, as at the end


def test_tasks_join_one_after_the_other() -> None:
    rows = plan(Curriculum(SIZES, num_steps=6, names=NAMES, order=["c", "a", "情感"]), 6)
    np.testing.assert_allclose(rows, [[0, 0, 1]] * 2 + [[0.5, 0, 0.5]] * 2 + [[1 / 3] * 3] * 2)


def test_overlap_is_the_weight_of_earlier_tasks() -> None:
    rows = plan(Curriculum(SIZES, num_steps=3, names=NAMES, order=["a", "情感", "c"], overlap=0.25), 3)
    np.testing.assert_allclose(rows, [[1, 0, 0], [0.2, 0.8, 0], [1 / 6, 1 / 6, 4 / 6]])


def test_floor_is_spread_evenly_at_all_times() -> None:
    rows = plan(Curriculum(SIZES, num_steps=3, names=NAMES, order=NAMES, overlap=0.0, floor=0.3), 3)
    np.testing.assert_allclose(rows, 0.7 * np.eye(3) + 0.1)


def test_phases_that_do_not_divide_the_steps() -> None:
    rows = plan(Curriculum(SIZES, num_steps=10, names=NAMES, order=NAMES, overlap=0.0), 10)
    assert rows.argmax(axis=1).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert plan(
        Curriculum([1] * 5, num_steps=2, names=list("abcde"), order=list("abcde"), overlap=0.0), 2
    ).tolist() == [
        [1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0],
    ]


def test_by_difficulty() -> None:
    sampler = Curriculum(SIZES, num_steps=3, overlap=0.0)
    assert sampler.probabilities == pytest.approx([1 / 3] * 3)
    sampler.update(evaluated({0: 2.0, 2: 1.0}))
    assert sampler.probabilities == pytest.approx([1 / 3] * 3)  # not yet known of every task
    sampler.update(evaluated({0: 2.0, 1: 3.0, 2: 1.0}))
    sampler.update(evaluated({0: 1.0, 1: 2.0, 2: 3.0}))  # only the first counts
    np.testing.assert_allclose(plan(sampler, 3), [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
    assert sampler.signals == {"difficulty": [2.0, 3.0, 1.0]}


def test_a_resumed_run_keeps_the_order_by_difficulty() -> None:
    sampler, resumed = (Curriculum(SIZES, num_steps=6, overlap=0.0) for _ in range(2))
    sampler.update(evaluated({0: 2.0, 1: 3.0, 2: 1.0}))
    plan(sampler, 2)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    resumed.update(evaluated({0: 1.0, 1: 2.0, 2: 3.0}))
    np.testing.assert_array_equal(plan(resumed, 4), plan(sampler, 4))


def test_schedule() -> None:
    schedule = [
        {"until": 0.25, "weights": {"a": 1}},
        {"until": 0.5, "weights": {"情感": 3, "a": 1}},
        {"until": 1, "weights": {"a": 1, "情感": 1, "c": 2}},
    ]
    rows = plan(Curriculum(SIZES, num_steps=8, names=NAMES, schedule=schedule), 8)
    np.testing.assert_allclose(rows, [[1, 0, 0]] * 2 + [[0.25, 0.75, 0]] * 2 + [[0.25, 0.25, 0.5]] * 4)


def test_phases_end_where_rounding_would_not() -> None:
    schedule = [{"until": 3 * 0.1, "weights": [1, 0, 0]}, {"until": 1, "weights": [0, 1, 0]}]
    rows = plan(Curriculum(SIZES, num_steps=10, schedule=schedule), 10)
    assert rows.argmax(axis=1).tolist() == [0] * 3 + [1] * 7


def test_a_single_task_and_a_single_step() -> None:
    for arguments in ({}, {"order": ["a"]}, {"schedule": [{"until": 1, "weights": {"a": 5}}]}):
        sampler = Curriculum([3], num_steps=1, names=["a"], **arguments)
        sampler.update(evaluated({0: 1.0}))
        sampler.update(STEP)
        assert sampler.probabilities == (1.0,)


def one_phase(weights: Any, until: Any = 1) -> dict[str, Any]:
    return {"schedule": [{"until": until, "weights": weights}]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, r"^num_steps: must be at least 1, found 0; "),
        ({"overlap": 1.5}, r"^overlap: must be in \[0, 1\], found 1.5; "),
        ({"order": "easy"}, r'^order: must be "difficulty" or a list of tasks, found \'easy\'; '),
        ({"order": ["a", "c"]}, r"^order: must name every task once, found \['a', 'c'\]; the tasks are "),
        ({"order": ["a", "c", "c"]}, r"^order: must name every task once, found "),
        ({"order": NAMES, "names": None}, r"^names: must be given to read the order, found None; "),
        (one_phase({"b": 1}), r"^schedule: must name tasks of the run, found 'b'; the tasks are "),
        (one_phase({"a": 0}), r"^schedule: weights must be finite, not negative, not all 0, found \[0.0, 0.0, 0.0\]; "),
        (one_phase({"a": 1, "c": -1}), r"^schedule: weights must be finite, not negative, not all 0, found "),
        (one_phase([1, 2]), r"^schedule: must be one for each of 3 tasks, found 2; "),
        (one_phase({"a": 1}, until=0.5), r"^schedule: until must ascend from above 0 to 1, found \[0.5\]; "),
        ({"schedule": []}, r"^schedule: until must ascend from above 0 to 1, found \[\]; "),
        ({"schedule": [{"until": 1}]}, r"^schedule: every entry must have until and weights, found \['until'\]; "),
        (
            {"schedule": [{"until": 1, "weights": {"a": 1}}] * 2},
            r"^schedule: until must ascend .*, found \[1.0, 1.0\]; ",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(**({"sizes": SIZES, "num_steps": 4, "names": NAMES} | arguments))
