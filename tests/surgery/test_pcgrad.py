from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl.surgery import PCGrad, gramian
from mtl.surgery.pcgrad import project, random_orders

G2 = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
G3 = torch.tensor([[4.0, -1.0, 0.5], [-1.0, 1.0, -0.6], [0.5, -0.6, 2.0]], dtype=torch.float64)


def rows_of(gramian_MM: Tensor) -> Tensor:
    return torch.linalg.cholesky(gramian_MM)


def in_parameter_space(rows: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """The paper's algorithm on the gradients themselves: returns the projected rows."""
    projected = []
    for row, order in zip(rows, orders, strict=True):
        gradient = row.copy()
        for j in order:
            inner = gradient @ rows[j]
            if inner < 0:
                gradient -= inner / (rows[j] @ rows[j]) * rows[j]
        projected.append(gradient)
    return np.stack(projected)


def random_problems(num_problems: int) -> list[tuple[Tensor, Tensor]]:
    """Rows that are random, strongly conflicting, of a common component, or of norms over four decades, with orders."""
    generator = torch.Generator().manual_seed(0)
    problems = []
    for index in range(num_problems):
        num_rows = 2 + index % 7
        num_parameters = 3 + int(torch.randint(60, (), generator=generator))
        rows = torch.randn(num_rows, num_parameters, generator=generator, dtype=torch.float64)
        if index % 4 == 1:
            rows -= 0.9 * rows.mean(dim=0)
        elif index % 4 == 2:
            rows += torch.randn(num_parameters, generator=generator, dtype=torch.float64)
        elif index % 4 == 3:
            exponents = 4 * torch.rand(num_rows, 1, generator=generator, dtype=torch.float64) - 2
            rows = (rows - 0.9 * rows.mean(dim=0)) * 10**exponents
        problems.append((rows, random_orders(num_rows, generator)))
    return problems


PROBLEMS = random_problems(100)


def test_problems_conflict() -> None:
    assert sum(bool((gramian(rows) < 0).any()) for rows, _ in PROBLEMS) > 70
    assert {len(rows) for rows, _ in PROBLEMS} == set(range(2, 9))


def test_golden_two_tasks() -> None:
    torch.testing.assert_close(
        PCGrad(scale="paper").coefficients(G2), torch.tensor([1.5, 4 / 3], dtype=torch.float64), rtol=1e-15, atol=0
    )
    torch.testing.assert_close(
        PCGrad().coefficients(G2), torch.tensor([0.75, 2 / 3], dtype=torch.float64), rtol=1e-15, atol=0
    )


def test_golden_three_tasks() -> None:
    found = project(G3, torch.tensor([[1, 2], [0, 2], [0, 1]])).sum(dim=0)
    torch.testing.assert_close(found, torch.tensor([1.25, 2.6, 1.2875], dtype=torch.float64), rtol=1e-14, atol=0)


def test_golden_expectation_by_enumeration_and_by_drawing() -> None:
    golden = torch.tensor([1.24375, 2.6, 1.29375], dtype=torch.float64)
    orders = [list(permutations([j for j in range(3) if j != i])) for i in range(3)]
    each = torch.stack([project(G3, torch.tensor(order)).sum(dim=0) for order in product(*orders)])
    torch.testing.assert_close(each.mean(dim=0), golden, rtol=1e-14, atol=0)
    surgery = PCGrad(seed=0, scale="paper")
    drawn = torch.stack([surgery.coefficients(G3) for _ in range(2_000)])
    error = (drawn.mean(dim=0) - golden).abs()
    assert (error <= 4 * drawn.std(dim=0) / 2_000**0.5 + 1e-12).all()
    assert len(drawn.unique(dim=0)) > 2


def test_orders_are_independent_uniform_and_never_meet_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_orders(4, generator) for _ in range(3_000)])
    for row in range(4):
        others = [j for j in range(4) if j != row]
        orders, counts = drawn[:, row].unique(dim=0, return_counts=True)
        assert [tuple(order) for order in orders.tolist()] == sorted(permutations(others))
        assert ((counts - 500).abs() < 5 * 500**0.5).all()
    assert len(drawn.flatten(1).unique(dim=0)) > 800  # of 6 ** 4; one shuffle for all rows would give 24


@pytest.mark.parametrize("index", range(100))
def test_equals_the_algorithm_in_parameter_space(index: int) -> None:
    rows, orders = PROBLEMS[index]
    projected = in_parameter_space(rows.numpy(), orders.numpy())
    tolerance = 1e-12 * float(rows.norm(dim=1).sum())
    found = project(gramian(rows), orders)
    np.testing.assert_allclose((found @ rows).numpy(), projected, rtol=0, atol=tolerance)
    np.testing.assert_allclose((found.sum(dim=0) @ rows).numpy(), projected.sum(axis=0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("index", range(0, 100, 7))
def test_surgery_on_rows_equals_the_algorithm_in_parameter_space(index: int) -> None:
    rows, _ = PROBLEMS[index]
    orders = random_orders(len(rows), torch.Generator().manual_seed(index))
    expected = in_parameter_space(rows.numpy(), orders.numpy()).sum(axis=0)
    tolerance = float(rows.norm(dim=1).sum())
    paper, mean = PCGrad(seed=index, scale="paper")(rows), PCGrad(seed=index)(rows)
    np.testing.assert_allclose(paper.numpy(), expected, rtol=0, atol=1e-12 * tolerance)
    np.testing.assert_allclose(mean.numpy(), expected / len(rows), rtol=0, atol=1e-12 * tolerance)
    single = PCGrad(seed=index, scale="paper")(rows.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=0, atol=1e-5 * tolerance)


def test_projections_never_lengthen_a_row_and_end_without_conflict() -> None:
    for rows, orders in PROBLEMS:
        projected = project(gramian(rows), orders) @ rows
        norms = rows.norm(dim=1)
        assert (projected.norm(dim=1) <= norms * (1 + 1e-12)).all()
        last = rows[orders[:, -1]]
        assert ((projected * last).sum(dim=1) >= -1e-12 * norms * last.norm(dim=1)).all()


def test_coefficients_are_at_least_1() -> None:
    for rows, orders in PROBLEMS:
        found = project(gramian(rows), orders)
        assert (found >= 0).all()
        assert (found.sum(dim=0) >= 1).all()


def test_commutes_with_loss_weights() -> None:
    generator = torch.Generator().manual_seed(5)
    for rows, orders in PROBLEMS:
        weights = 10 ** (2 * torch.rand(len(rows), generator=generator, dtype=torch.float64) - 1)
        scale = weights.diag()
        found = project(scale @ gramian(rows) @ scale, orders)
        torch.testing.assert_close(
            found, scale @ project(gramian(rows), orders) @ (1 / weights).diag(), rtol=1e-9, atol=1e-9
        )


def test_weights_act() -> None:
    rows, orders = PROBLEMS[7]
    weights = torch.ones(len(rows), 1, dtype=torch.float64)
    weights[0] = 2
    plain = project(gramian(rows), orders) @ rows
    weighted = project(gramian(weights * rows), orders) @ (weights * rows)
    torch.testing.assert_close(weighted, weights * plain, rtol=1e-12, atol=1e-12)
    assert PCGrad().weights_act == "yes"


def test_degree_1_and_rotation() -> None:
    rows, _ = PROBLEMS[5]
    rotation, _ = torch.linalg.qr(torch.randn(2 * [rows.shape[1]], generator=torch.Generator(), dtype=torch.float64))
    torch.testing.assert_close(PCGrad(seed=1)(7 * rows), 7 * PCGrad(seed=1)(rows), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(PCGrad(seed=1)(rows @ rotation), PCGrad(seed=1)(rows) @ rotation, rtol=1e-10, atol=1e-10)


def test_permuting_rows_and_orders_together_permutes_the_coefficients() -> None:
    order = torch.tensor([2, 0, 1])
    orders = torch.tensor([[1, 2], [2, 0], [0, 1]])
    inverse = order.argsort()
    permuted = project(G3[order][:, order], inverse[orders[order]])
    torch.testing.assert_close(permuted, project(G3, orders)[order][:, order], rtol=1e-14, atol=1e-15)


def test_two_conflicting_rows_end_orthogonal_to_the_other() -> None:
    projected = project(G2, torch.tensor([[1], [0]])) @ rows_of(G2)
    inner = projected @ rows_of(G2).T
    torch.testing.assert_close(inner[[0, 1], [1, 0]], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)


def test_opposed_pair_cancels() -> None:
    row = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    torch.testing.assert_close(PCGrad()(torch.stack([row, -row])), 0 * row, rtol=0, atol=1e-14)
    torch.testing.assert_close(PCGrad()(torch.stack([row, -100 * row])), 0 * row, rtol=0, atol=1e-13)


def test_without_conflict_it_is_the_sum_or_the_mean() -> None:
    rows = torch.rand(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert PCGrad(scale="paper").coefficients(gramian(rows)).tolist() == [1.0] * 5
    assert PCGrad().coefficients(gramian(rows)).tolist() == [0.2] * 5


@pytest.mark.parametrize("num_rows", [1, 2, 8])
def test_identical_rows_give_the_row(num_rows: int) -> None:
    row = torch.randn(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(PCGrad()(row.expand(num_rows, -1)), row, rtol=1e-14, atol=1e-15)


def test_single_row_is_left_alone_bitwise() -> None:
    row = torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(PCGrad()(row), row[0])


def test_zero_and_vanishing_rows_give_no_nan() -> None:
    rows = torch.tensor([[1.0, -2.0], [0.0, 0.0], [-1.0, 1.0], [-1e-170, 0.0]], dtype=torch.float64)
    for seed in range(10):
        assert torch.isfinite(PCGrad(seed=seed)(rows)).all()
    assert PCGrad().coefficients(torch.zeros(3, 3)).tolist() == [1 / 3] * 3


def test_float32_gramian_is_accepted() -> None:
    found = PCGrad().coefficients(G2.float())
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0.75, 2 / 3])


def test_input_is_not_changed() -> None:
    before = G3.clone()
    PCGrad().coefficients(G3)
    assert torch.equal(G3, before)


def test_seed_decides_the_orders_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    streams = [[PCGrad(seed=seed).coefficients(G3).tolist() for _ in range(1)] for seed in range(20)]
    assert streams[3] == [PCGrad(seed=3).coefficients(G3).tolist()]
    assert any(stream != streams[0] for stream in streams)
    assert torch.equal(before, torch.get_rng_state())


def test_state_round_trips_bitwise() -> None:
    surgery, resumed = PCGrad(seed=0), PCGrad(seed=1)
    gramians = [gramian(rows) for rows, _ in PROBLEMS[:30]]
    for each in gramians[:15]:
        surgery.coefficients(each)
    state = surgery.state_dict()
    assert state["generator"].dtype == torch.uint8
    surgery.coefficients(G3)  # a snapshot does not move with the generator
    surgery.load_state_dict(state)
    resumed.load_state_dict(state)
    for each in gramians[15:]:
        assert torch.equal(surgery.coefficients(each), resumed.coefficients(each))


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r'^scale: must be "mean" or "paper", found \'sum\'; '):
        PCGrad(scale="sum")
