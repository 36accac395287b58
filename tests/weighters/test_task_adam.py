from __future__ import annotations

import pytest
import torch

from mtl.weighters.adam import TaskAdam


def test_agrees_with_torch_adam_of_each_task_on_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    adam, numbers_T = TaskAdam(3, learning_rate=0.04), torch.zeros(3, dtype=torch.float64)
    references = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    optimizers = [torch.optim.Adam([reference], lr=0.04) for reference in references]
    for _ in range(80):
        gradient_T = torch.randn(3, dtype=torch.float64, generator=generator)
        tasks = [task for task in range(3) if torch.rand((), generator=generator) < 0.6]
        numbers_T[tasks] -= adam.step(tasks, gradient_T[tasks])
        for task in tasks:
            references[task].grad = gradient_T[task].clone()
            optimizers[task].step()
    expected_T = torch.stack([reference.detach() for reference in references])
    torch.testing.assert_close(numbers_T, expected_T, rtol=1e-12, atol=1e-14)


def test_absent_tasks_and_empty_steps_leave_the_moments_alone() -> None:
    adam = TaskAdam(2, learning_rate=0.1)
    adam.step([0, 1], torch.tensor([1.0, -2.0], dtype=torch.float64))
    before = adam.state_dict()
    adam.step([], torch.zeros(0, dtype=torch.float64))
    assert all(torch.equal(values, before[key]) for key, values in adam.state_dict().items())
    adam.step([1], torch.tensor([3.0], dtype=torch.float64))
    for key, values in adam.state_dict().items():
        assert values[0] == before[key][0] and values[1] != before[key][1], key


@pytest.mark.parametrize("learning_rate", [0.0, -1.0, float("nan")])
def test_learning_rate_is_above_0(learning_rate: float) -> None:
    with pytest.raises(ValueError, match=rf"^learning_rate: must be above 0, found {learning_rate}; "):
        TaskAdam(2, learning_rate)
