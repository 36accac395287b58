"""Each adaptive sampler raises the weak task's probability when, and only when, it should: tasks of known laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mtl.interfaces import TaskFeedback, TaskSampler
from mtl.samplers import Curriculum, DoReMi, Exp3, Exp3S, Performance, SkillIt

BATCH_SIZE, EVALUATE_EVERY = 16, 10


class Tasks:
    """Tasks whose losses fall to a limit: an example of task i closes ``rates[i][t]`` of what task t has left to learn.

    A task's score is the share of what can be learned that has been.
    """

    def __init__(self, start: Sequence[float], limit: Sequence[float], rates: Any) -> None:
        self.start_T, self.limit_T = np.array(start, dtype=float), np.array(limit, dtype=float)
        self.losses_T = self.start_T.copy()
        self.rates_TT = np.diag(rates) if np.ndim(rates) == 1 else np.array(rates)

    def train(self, sampler: TaskSampler, steps: range) -> np.ndarray:
        """Trains with the sampler; the probabilities that each step was drawn with [steps, T]."""
        rows = []
        for step in steps:
            if step % EVALUATE_EVERY == 0:
                self.evaluate(sampler, step)
            rows.append(sampler.probabilities)
            counts = np.array(sampler.counts(BATCH_SIZE))
            before = self.losses_T
            self.losses_T = self.limit_T + (before - self.limit_T) * np.exp(-counts @ self.rates_TT)
            tasks = np.flatnonzero(counts)
            sampler.update(
                TaskFeedback(
                    step,
                    tasks.tolist(),
                    counts[tasks].tolist(),
                    torch.tensor(before[tasks]),
                    losses_after_M=torch.tensor(self.losses_T[tasks]),
                )
            )
        return np.array(rows)

    def evaluate(self, sampler: TaskSampler, step: int) -> None:
        learned_T = (self.start_T - self.losses_T) / np.maximum(self.start_T - self.limit_T, 1e-12)
        results = {
            task: {"loss": float(loss), "score": float(score)}
            for task, (loss, score) in enumerate(zip(self.losses_T, learned_T, strict=True))
        }
        sampler.update(TaskFeedback(step, [], [], torch.empty(0), validation=results))


ADAPTIVE: dict[str, Callable[[], TaskSampler]] = {
    "doremi": lambda: DoReMi([100] * 3, references=[1.0] * 3),
    "exp3": lambda: Exp3([100] * 3, num_steps=300),
    "exp3 gap_closed": lambda: Exp3([100] * 3, reward="gap_closed", gamma=0.3),
    "exp3s": lambda: Exp3S([100] * 3, eta=0.05),
    "exp3s gap_closed": lambda: Exp3S([100] * 3, reward="gap_closed", eta=0.1),
    "performance gap": lambda: Performance([100] * 3),
    "performance loss_ratio": lambda: Performance([100] * 3, signal="loss_ratio"),
    "performance progress": lambda: Performance([100] * 3, signal="progress"),
    "skillit": lambda: SkillIt([100] * 3),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_tasks_of_one_law_stay_alike(name: str) -> None:
    rows = Tasks([3.0] * 3, [1.0] * 3, [0.002] * 3).train(ADAPTIVE[name](), range(300))
    assert np.abs(rows - 1 / 3).max() < 0.06


def test_gap_raises_the_task_far_from_its_target_until_it_gets_there() -> None:
    tasks = Tasks([3.0] * 3, [1.0] * 3, [0.01, 0.0005, 0.01])
    rows = tasks.train(Performance([100] * 3, targets=0.6), range(700))
    np.testing.assert_allclose(rows[0], [1 / 3] * 3)
    assert rows[100, 1] > 0.9  # the others have reached theirs
    np.testing.assert_allclose(rows[-1], [1 / 3] * 3)  # as has this one
    behind = np.flatnonzero(rows[:, 1] > 0.5)
    assert (np.diff(behind) == 1).all()  # once


def test_loss_ratio_raises_the_task_that_learns_slowly_and_lets_it_go_when_it_has_caught_up() -> None:
    tasks = Tasks([4.0, 1.0, 2.0], [0.4, 0.1, 0.2], [0.01, 0.001, 0.01])
    rows = tasks.train(Performance([100] * 3, signal="loss_ratio"), range(800))
    assert rows[0, 1] == pytest.approx(1 / 3)
    assert rows[80, 1] > 0.55
    np.testing.assert_allclose(rows[-1], [1 / 3] * 3, atol=0.01)  # all at a tenth


def test_progress_raises_the_tasks_that_move_and_not_the_finished_or_the_hopeless() -> None:
    tasks = Tasks([3.0, 3.0, 3.0], [1.0, 1.0, 1.0], [0.05, 0.001, 0.0])
    rows = tasks.train(Performance([100] * 3, signal="progress", window=3), range(200))
    assert rows[15, 0] > 0.8  # learns at once, and fastest
    assert rows[100, 1] > 0.9  # still learns when the first is done
    assert rows[20:, 2].max() < 0.05


@pytest.mark.parametrize("name", ["exp3", "exp3 gap_closed", "exp3s", "exp3s gap_closed"])
def test_bandits_raise_the_task_that_training_improves(name: str) -> None:
    """The first task is learned already, the last can't be learned and has the largest loss."""
    rows = Tasks([0.5, 3.0, 6.0], [0.5, 0.3, 6.0], [0.0, 0.001, 0.0]).train(ADAPTIVE[name](), range(300))
    assert rows[-1, 1] > 0.55
    assert rows[-1, 1] > 2 * max(rows[-1, 0], rows[-1, 2])
    np.testing.assert_allclose(rows[-1, 0], rows[-1, 2], atol=0.02)


def test_exp3s_follows_a_change_of_the_best_task() -> None:
    tasks, sampler = Tasks([3.0, 3.0], [1.0, 3.0], [0.002, 0.002]), Exp3S([100] * 2, eta=0.1)
    first = tasks.train(sampler, range(200))
    tasks.limit_T = np.array([tasks.losses_T[0], 0.5])
    second = tasks.train(sampler, range(200, 500))
    assert first[-1, 0] > 0.7
    assert second[-1, 1] > 0.7


def test_doremi_raises_the_task_behind_its_reference_and_not_the_one_of_high_entropy() -> None:
    """The first task's loss stays at 5, which is its reference; the second is far from its own at first."""
    tasks = Tasks([5.0, 2.0, 1.0], [5.0, 0.4, 1.0], [0.0, 0.003, 0.0])
    sampler = DoReMi([100] * 3, references=[5.0, 0.5, 1.0], eta=0.02, average=False)
    rows = tasks.train(sampler, range(100))
    assert rows[0].tolist() == pytest.approx([1 / 3] * 3)
    assert rows[-1, 1] > 0.5
    np.testing.assert_allclose(rows[:, 0], rows[:, 2], rtol=1e-9)
    while tasks.losses_T[1] > 0.5:
        tasks.train(sampler, range(100, 101))
    reached = tasks.train(sampler, range(101, 201))
    assert (np.diff(reached[:, 1]) < 0).all()  # only the floor is left, which brings the tasks together


def test_skillit_raises_the_task_that_teaches_the_weak_one() -> None:
    """The first task's examples teach the second, whose own examples do nothing; the third is alone and learned."""
    rates = [[0.002, 0.002, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.05]]

    def trained_with(matrix: Any) -> np.ndarray:
        tasks = Tasks([3.0] * 3, [0.3] * 3, rates)
        return tasks.train(SkillIt([100] * 3, matrix=matrix, eta=1.0, floor=0.0), range(100))

    informed = trained_with([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    assert informed[-1, 0] > 0.55
    assert informed[-1, 1] < informed[-1, 0] / 3
    ignorant = trained_with(None)
    np.testing.assert_allclose(ignorant[-1, 0], ignorant[-1, 1], rtol=1e-9)  # both weak, and nothing says who teaches
    assert ignorant[-1, 2] < 0.2


def test_curriculum_trains_the_easy_task_first() -> None:
    rows = Tasks([2.0, 3.0, 1.0], [0.1] * 3, [0.01] * 3).train(
        Curriculum([100] * 3, num_steps=30, overlap=0.0), range(30)
    )
    assert rows.argmax(axis=1).tolist() == [2] * 10 + [0] * 10 + [1] * 10
