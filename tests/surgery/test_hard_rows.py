"""Rows that are 0, opposed, equal, tiny or huge: a finite result and no exception."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl.surgery import (
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradVac,
    NashMTL,
    PCGrad,
    SDMGrad,
    UPGrad,
    gramian,
)


def random_rows(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 20, generator=torch.Generator().manual_seed(num_rows), dtype=torch.float64)


A, B, C, D = random_rows(4)
ROWS = {
    "a row of 0": [A, 0 * B, C],
    "nothing but 0": [0 * A, 0 * B, 0 * C],
    "one row of 0": [0 * A],
    "opposed": [A, -A],
    "opposed, of other lengths": [A, -3 * A],
    "two of three opposed": [A, -2 * A, B],
    "sum 0": [A, B, -A - B],
    "equal": [A, A, A, A],
    "equal pairs, sum 0": [A, A, B, B, -A - B],
    "equal directions": [A, 1e3 * A, 1e-3 * A, B],
    "norms of 1e-200": [1e-200 * A, 1e-200 * B, -1e-200 * A],
    "norms of 1e-155, whose squares lose their digits": [1e-155 * A, 1e-155 * B, -1e-155 * A],
    "one of 1e-200": [A, 1e-200 * B, -1e-200 * A],
    "norms of 1e150": [1e150 * A, 1e150 * B, -1e150 * A],
    "norms of 1e150 and 1e-140": [1e150 * A, 1e-140 * B],
    "norms of 1e150 and 1e-140, opposed": [1e150 * A, -1e-140 * A + 1e-141 * B],
    "norms of 1e150, 1e-200 and 1": [1e150 * A, 1e-200 * B, C, -A],
    "nearly opposed": [A, -A + 1e-7 * B, C],
    "nearly equal": [A, A + 1e-9 * B, -A],
    "more rows than columns": [*random_rows(30)[:, :2].split(1)],
    "one column": [*torch.tensor([[1.0], [-2.0], [3.0]], dtype=torch.float64)],
    "no column": [*torch.zeros(3, 0, dtype=torch.float64)],
}


def test_the_result_is_finite_and_not_long(make_surgery) -> None:
    for name, parts in ROWS.items():
        for dtype in (torch.float64, torch.float32):
            rows = torch.stack([row.flatten() for row in parts]).to(dtype)
            if not rows.isfinite().all():
                continue  # 1e150 in float32
            surgery = make_surgery()
            for _ in range(3):
                found = surgery(rows)
                assert found.isfinite().all(), (name, dtype)
                assert (found.abs() <= 100 * rows.abs().sum()).all(), (name, dtype)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_float32_rows_of_any_size_are_combined_like_others(make_surgery, size: float) -> None:
    rows = random_rows(4).float()
    found, usual = make_surgery()(size * rows), make_surgery()(rows)
    torch.testing.assert_close((found.double() / size).float(), usual, rtol=1e-4, atol=1e-5)


def test_float32_rows_of_any_two_sizes_have_a_finite_result(make_surgery) -> None:
    """Its coefficients may leave the range of float32."""
    rows = random_rows(4) * torch.tensor([[1e-30], [1.0], [1e30], [1e-3]], dtype=torch.float64)
    assert make_surgery()(rows.float()).isfinite().all()


@pytest.mark.parametrize("surgery", [ConFIG(), IMTLG()], ids=lambda surgery: type(surgery).__name__)
@pytest.mark.parametrize("left", [1e-2, 1e-4, 1e-5, 1e-6])
def test_what_is_left_of_nearly_opposed_rows_has_equal_angles(surgery, left: float) -> None:
    """It is a small eigenvalue of their Gramian; leaving it out would hurt a task."""
    for rows in (torch.stack([A, left * B - A]), torch.stack([A, B, left * C - A - B])):
        d = surgery(rows)
        products = rows @ d / (rows.norm(dim=1) * d.norm())
        assert (products > 0.1 * left).all()
        torch.testing.assert_close(products, products.mean().expand(len(rows)), rtol=1e-2, atol=0)


def test_rows_of_0_give_0(make_surgery) -> None:
    assert make_surgery()(torch.zeros(3, 7)).tolist() == [0.0] * 7


@pytest.mark.parametrize(
    "surgery",
    [MGDA(), NashMTL(), FairGrad(), UPGrad(), DualProj(), ConFIG(), CAGrad(c=1.0), CAGrad(c=1.5), PCGrad(), GradVac()],
    ids=lambda surgery: type(surgery).__name__,
)
def test_an_opposed_pair_gives_0_where_no_task_may_be_hurt(surgery) -> None:
    for rows in (torch.stack([A, -A]), torch.stack([A, -3 * A])):
        torch.testing.assert_close(surgery(rows), 0 * A, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "surgery",
    [
        NashMTL(),
        FairGrad(),
        UPGrad(),
        DualProj(),
        ConFIG(),
        IMTLG(),
        CAGrad(),
        PCGrad(),
        AlignedMTL(),
        SDMGrad(),
        PCD(0),
    ],
    ids=lambda surgery: type(surgery).__name__,
)
def test_a_row_of_0_is_one_that_asks_for_nothing(surgery) -> None:
    """The others are combined as if it were not there, and it counts in the mean as any task does."""
    rows = torch.stack([A, 0 * A, B])
    found = surgery(rows)
    assert (rows[[0, 2]] @ found > 0).all()
    if not isinstance(surgery, AlignedMTL | SDMGrad | CAGrad):
        expected = type(surgery)(*([0] if isinstance(surgery, PCD) else []))(rows[[0, 2]])
        torch.testing.assert_close(found, expected if isinstance(surgery, IMTLG) else 2 / 3 * expected)


def test_mgda_gives_0_for_a_row_of_0() -> None:
    assert MGDA().coefficients(gramian(torch.stack([A, 0 * A, B]))).tolist() == [0.0] * 3


def test_tiny_rows_are_combined_like_others_while_their_squares_can_be_told(make_surgery) -> None:
    rows = random_rows(4)
    tiny, usual = make_surgery()(1e-120 * rows), make_surgery()(rows)
    torch.testing.assert_close(1e120 * tiny, usual, rtol=1e-9, atol=1e-9)
