from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl.surgery import GradDrop

ROWS = torch.tensor([[1.0, -2.0, 3.0, 0.0], [-1.0, -1.0, 1.0, 0.0], [4.0, 5.0, 2.0, 0.0]], dtype=torch.float64)


def random_rows(num_rows: int = 4, num_columns: int = 50) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def element_by_element(rows: Tensor, leaks: list[float], seed: int) -> Tensor:
    """Algorithm 1, an element at a time."""
    draws = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(seed))
    combined = []
    for column, draw in zip(rows.T.tolist(), draws.tolist(), strict=True):
        total = sum(abs(value) for value in column)
        purity = (1 + sum(column) / total) / 2 if total else 0.5
        kept = 0.0
        for value, leak in zip(column, leaks, strict=True):
            mask = value > 0 if purity > draw else value < 0
            kept += (leak + (1 - leak) * mask) * value
        combined.append(kept)
    return torch.tensor(combined, dtype=torch.float64)


@pytest.mark.parametrize("leaks", [[0.0] * 4, [0.3] * 4, [0.0, 1.0, 0.25, 0.5]])
def test_equals_the_algorithm_element_by_element(leaks: list[float]) -> None:
    rows, names = random_rows(), ["a", "b", "c", "d"]
    leak = leaks[0] if len(set(leaks)) == 1 else dict(zip(names, leaks, strict=True))
    for seed in range(20):
        expected = element_by_element(rows, leaks, seed)
        paper = GradDrop(leak=leak, names=names, seed=seed, scale="paper")(rows)
        torch.testing.assert_close(paper, expected, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(GradDrop(leak, names, seed)(rows), expected / 4, rtol=1e-13, atol=1e-14)


def test_every_element_is_the_sum_of_one_sign() -> None:
    surgery = GradDrop(scale="paper")
    drawn = torch.stack([surgery(ROWS) for _ in range(200)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[-1.0, 5.0], [-3.0, 5.0], [6.0], [0.0]]


def test_the_expectation_is_the_sum() -> None:
    surgery, rows = GradDrop(scale="paper", leak=0.2), random_rows(5, 20)
    drawn = torch.stack([surgery(rows) for _ in range(4_000)])
    error = (drawn.mean(dim=0) - rows.sum(dim=0)).abs()
    assert (error <= 4.5 * drawn.std(dim=0) / 4_000**0.5 + 1e-12).all()
    assert drawn.std(dim=0).median() > 0.1


def test_a_leak_of_1_is_the_mean() -> None:
    rows = random_rows()
    torch.testing.assert_close(GradDrop(leak=1.0)(rows), rows.mean(dim=0), rtol=1e-14, atol=1e-15)


def test_leaks_follow_their_tasks_and_absent_ones_change_nothing() -> None:
    rows, names = random_rows(2), ["a", "b", "c"]
    surgery = GradDrop(leak={"c": 1.0, "a": 0.5}, names=names, seed=3, scale="paper")
    torch.testing.assert_close(surgery(rows, [1, 2]), element_by_element(rows, [0.0, 1.0], 3))


def test_pure_signs_are_always_kept() -> None:
    rows = torch.cat([torch.ones(3, 5_000), -torch.ones(3, 5_000)], dim=1)
    surgery = GradDrop()
    for _ in range(20):
        assert torch.equal(surgery(rows), rows[0])


def test_seed_decides_and_the_global_generator_is_left_alone() -> None:
    before, rows = torch.get_rng_state(), random_rows()
    assert torch.equal(GradDrop(seed=1)(rows), GradDrop(seed=1)(rows))
    assert not torch.equal(GradDrop(seed=1)(rows), GradDrop(seed=2)(rows))
    assert torch.equal(before, torch.get_rng_state())


def test_state_round_trips_bitwise_and_the_rows_are_not_changed() -> None:
    surgery, resumed, rows = GradDrop(seed=0), GradDrop(seed=9), random_rows()
    before = rows.clone()
    for _ in range(5):
        surgery(rows)
    state = surgery.state_dict()
    expected = [surgery(rows) for _ in range(5)]
    resumed.load_state_dict(state)
    assert all(torch.equal(resumed(rows), each) for each in expected)
    assert torch.equal(before, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leak": 1.5}, r"^leak: must be a share in \[0, 1\], found 1.5; "),
        ({"leak": {"a": -0.1}, "names": ["a"]}, r"^leak: must be a share in \[0, 1\], found -0.1; "),
        ({"leak": {"x": 0.1}, "names": ["a"]}, r"^leak: must name tasks of the run, found 'x'; the tasks are \['a'\]"),
        ({"leak": {"x": 0.1}}, r"^names: must be given to read leaks by task name, found None; "),
        ({"scale": "sum"}, r"^scale: "),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradDrop(**options)
