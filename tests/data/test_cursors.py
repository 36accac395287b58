"""Cursors: each epoch visits each row once in a new order, and a resumed stream is the same stream."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mtl.data.cursors import TaskCursors


def rows(cursors: TaskCursors, counts_T: list[int], task: int = 0) -> list[int]:
    return [row for index, row in cursors.take(counts_T) if index == task]


def test_each_epoch_visits_each_row_once_in_an_order_of_its_own() -> None:
    cursors = TaskCursors([12], seed=0)
    orders = [tuple(rows(cursors, [12])) for _ in range(50)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(orders)) == 50


def test_takes_of_any_size_cut_one_stream() -> None:
    whole = rows(TaskCursors([7], seed=3), [100])
    cursors = TaskCursors([7], seed=3)
    assert [row for count in (1, 0, 5, 1, 20, 3, 70) for row in rows(cursors, [count])] == whole
    assert all(sorted(whole[begin : begin + 7]) == list(range(7)) for begin in range(0, 98, 7))


def test_examples_are_grouped_by_task() -> None:
    cursors = TaskCursors([3, 5, 4], seed=0)
    assert [task for task, _ in cursors.take([2, 0, 3])] == [0, 0, 2, 2, 2]
    assert [task for task, _ in cursors.take(np.array([0, 6, 0]))] == [1] * 6
    assert cursors.examples_seen_T == (2, 6, 3)
    assert cursors.epochs_seen_T == (2 / 3, 6 / 5, 3 / 4)


def test_tasks_do_not_move_each_other() -> None:
    alone, beside = TaskCursors([9, 9], seed=0), TaskCursors([9, 9], seed=0)
    for step in range(10):
        beside.take([0, step])
        assert rows(alone, [4, 0]) == rows(beside, [4, 0])


def test_tasks_and_seeds_have_orders_of_their_own() -> None:
    cursors = TaskCursors([20, 20], seed=0)
    first = rows(cursors, [20, 0])
    assert first != rows(cursors, [0, 20], task=1)
    assert first != rows(TaskCursors([20, 20], seed=1), [20, 0])
    assert first == rows(TaskCursors([20, 20], seed=0), [20, 0])


@pytest.mark.parametrize("steps_before", [0, 1, 7, 40])
def test_resume_goes_on_with_the_same_rows(steps_before: int) -> None:
    sizes, counts = [20, 400, 1], [3, 64, 1]
    cursors = TaskCursors(sizes, seed=5)
    for _ in range(steps_before):
        cursors.take(counts)
    state: dict[str, Any] = json.loads(json.dumps(cursors.state_dict()))
    resumed = TaskCursors(sizes, seed=5)
    resumed.take([11, 11, 11])  # whatever it did before, the state replaces
    resumed.load_state_dict(state)
    for _ in range(30):
        assert resumed.take(counts) == cursors.take(counts)
    assert resumed.state_dict() == cursors.state_dict()


def test_state_is_a_copy() -> None:
    cursors = TaskCursors([4], seed=0)
    state = cursors.state_dict()
    cursors.take([3])
    assert state == {"examples_seen": [0], "limits": {}, "limited": {}}


@pytest.mark.parametrize("sizes", [[], [3, 0], [-1]])
def test_sizes_must_be_positive(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^sizes must hold at least one row"):
        TaskCursors(sizes, seed=0)


@pytest.mark.parametrize("counts", [[1], [1, 2, 3], [1, -1]])
def test_counts_must_fit_the_tasks(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^counts_T must be 2 numbers"):
        TaskCursors([3, 3], seed=0).take(counts)


def test_state_of_other_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^examples_seen must have 2 entries"):
        TaskCursors([3, 3], seed=0).load_state_dict({"examples_seen": [1]})


def test_a_limit_draws_from_a_seeded_choice_in_shuffled_epochs_and_leaves_the_rest_alone():
    cursors = TaskCursors([10, 6], seed=4)
    cursors.take([3, 2])
    cursors.limit([0], 4)
    assert (cursors.size(0), cursors.size(1)) == (4, 6)
    epochs = [[row for task, row in cursors.take([4, 1]) if task == 0] for _ in range(5)]
    assert len({frozenset(rows) for rows in epochs}) == 1
    assert len(set(epochs[0])) == 4
    assert len(set(map(tuple, epochs))) > 1
    assert cursors.examples_seen_T == (23, 7)
    cursors.limit([], None)
    plain = TaskCursors([10, 6], seed=4)
    plain.take([23, 7])
    assert cursors.take([5, 5]) == plain.take([5, 5])


def test_a_limit_goes_on_after_a_resume():
    whole = TaskCursors([10, 6], seed=4)
    whole.limit([0, 1], 4)
    expected = [whole.take([3, 2]) for _ in range(8)]
    first = TaskCursors([10, 6], seed=4)
    first.limit([0, 1], 4)
    assert [first.take([3, 2]) for _ in range(3)] == expected[:3]
    second = TaskCursors([10, 6], seed=4)
    second.load_state_dict(first.state_dict())
    second.limit([0, 1], 4)  # what a resumed stage asks for again
    assert [second.take([3, 2]) for _ in range(5)] == expected[3:]


def test_a_limit_above_the_size_is_none():
    cursors = TaskCursors([10], seed=0)
    cursors.limit([0], 10)
    assert cursors.take([10]) == TaskCursors([10], seed=0).take([10])
