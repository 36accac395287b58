from __future__ import annotations

import torch

from mtl.weighters.scale import mean_one, redistributed


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_mean_one_keeps_proportions() -> None:
    assert mean_one(double(1, 2, 5)).tolist() == [0.375, 0.75, 1.875]


def test_mean_one_of_one_task_is_exactly_1() -> None:
    assert all(mean_one(double(value)).tolist() == [1.0] for value in (49.0, 0.1, 1e-300, 1e300, 0.0))


def test_no_weights_at_all_become_equal() -> None:
    assert mean_one(torch.zeros(3, dtype=torch.float64)).tolist() == [1, 1, 1]


def test_only_present_tasks_share_anew_what_they_had() -> None:
    before = double(0.3, 1.2, 0.5, 2.0)
    after = redistributed(before, [0, 3], double(3, 1))
    torch.testing.assert_close(after, double(1.725, 1.2, 0.5, 0.575))
    assert torch.equal(after[[1, 2]], before[[1, 2]])
    assert before.tolist() == [0.3, 1.2, 0.5, 2.0]


def test_no_task_or_one_task_changes_nothing() -> None:
    before = double(0.3, 1.7)
    assert torch.equal(redistributed(before, [], double()), before)
    assert torch.equal(redistributed(before, [1], double(7)), before)
