"""The samplers around samplers: what is replayed, and what has converged."""

import numpy as np
import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.samplers import Equal, Exp3, Performance, Temperature
from mtl.samplers.converged import Converged
from mtl.samplers.replay import Replay, restricted


def feedback(tasks, losses, validation=None):
    losses_M = torch.tensor(losses, dtype=torch.float64)
    gramian_MM = torch.outer(losses_M, losses_M)
    num_targets_M = [10 * task for task in tasks]
    return TaskFeedback(
        3, tasks, [task + 1 for task in tasks], losses_M, losses_M / 2, gramian_MM, validation, num_targets_M
    )


def test_replay_gives_the_others_their_share_at_all_times():
    sampler = Replay(Temperature([10, 1000], 2.0), focus=[1, 3], num_tasks=5, share=0.3, seed=1)
    assert sampler.probabilities == pytest.approx([0.1, 0.7 / 11, 0.1, 7 / 11, 0.1])
    totals = np.zeros(5)
    for step in range(1, 501):
        totals += sampler.counts(7)
        # Two levels of draws, each within one example of its expectation.
        assert np.abs(totals - 7 * step * np.array(sampler.probabilities)).max() < 2
    assert sum(sampler.counts(16)) == 16


@pytest.mark.parametrize(
    "inner", [lambda: Exp3([5, 6, 7], num_steps=100, seed=2), lambda: Performance([5, 6, 7], signal="loss_ratio")]
)
def test_replay_goes_on_from_its_state(inner):
    def make():
        return Replay(inner(), focus=[0, 2, 3], num_tasks=5, share=0.25, seed=3)

    def step(sampler, number):
        counts = sampler.counts(8)
        present = [task for task, count in enumerate(counts) if count]
        sampler.update(feedback(present, [1.0 + task / number for task in present]))
        return counts

    whole = make()
    expected = [step(whole, number) for number in range(1, 30)]
    first, second = make(), make()
    assert [step(first, number) for number in range(1, 12)] == expected[:11]
    second.load_state_dict(first.state_dict())
    assert [step(second, number) for number in range(12, 30)] == expected[11:]
    assert second.probabilities == whole.probabilities


def test_the_inner_sampler_hears_of_its_own_tasks_only():
    validation = {0: {"loss": 1.0}, 2: {"loss": 2.0}, 4: {"loss": 3.0}}
    kept = restricted(feedback([0, 2, 4], [1.0, 2.0, 3.0], validation), [2, 4])
    assert (kept.tasks, kept.counts_M, kept.step) == ([0, 1], [3, 5], 3)
    assert kept.losses_M.tolist() == [2.0, 3.0]
    assert kept.num_targets_M == [20, 40]
    assert kept.losses_after_M.tolist() == [1.0, 1.5]
    assert kept.gramian_MM.tolist() == [[4.0, 6.0], [6.0, 9.0]]
    assert kept.validation == {0: {"loss": 2.0}, 1: {"loss": 3.0}}


def test_replay_of_nothing_is_refused():
    with pytest.raises(ValueError, match="focus: must leave a task to replay, found all 2"):
        Replay(Equal([1, 1]), focus=[0, 1], num_tasks=2, share=0.1)
    with pytest.raises(ValueError, match="share: must be at least 0 and below 1, found 1"):
        Replay(Equal([1]), focus=[0], num_tasks=2, share=1.0)


def test_a_converged_task_falls_to_the_floor_and_the_others_share_the_rest():
    sampler = Converged(Temperature([1, 1, 2], 1.0), floor=0.1)
    assert sampler.probabilities == [0.25, 0.25, 0.5]
    sampler.converged = [2]
    assert sampler.probabilities == pytest.approx([0.25 / 0.55, 0.25 / 0.55, 0.05 / 0.55])
    totals = np.zeros(3)
    for step in range(1, 301):
        totals += sampler.counts(5)
        assert np.abs(totals - 5 * step * np.array(sampler.probabilities)).max() <= 1 - 1 / 4 + 1e-9
    copy = Converged(Temperature([1, 1, 2], 1.0), floor=0.1)
    copy.load_state_dict(sampler.state_dict())
    assert [copy.counts(3) for _ in range(20)] == [sampler.counts(3) for _ in range(20)]
    with pytest.raises(ValueError, match="floor: must be above 0 and at most 1, found 0"):
        Converged(Equal([1, 1]), floor=0.0)
