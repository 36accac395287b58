"""Coefficients in the scale of the papers, to the digits that they were computed to elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl.surgery import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradVac,
    NashMTL,
    PCGrad,
    UPGrad,
)

G2 = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
G3 = torch.tensor([[4.0, -1.0, 0.5], [-1.0, 1.0, -0.6], [0.5, -0.6, 2.0]], dtype=torch.float64)

GOLDEN = {
    "MGDA": (MGDA(scale="paper"), (4 / 7, 3 / 7), (0.1738251642, 0.5735219808, 0.252652855)),
    "CAGrad": (CAGrad(c=0.5, scale="paper"), (0.8348441274, 0.6261330955), (1 / 3, 0.698481705, 1 / 3)),
    "NashMTL": (
        NashMTL(scale="paper"),
        (0.9192110608, 0.7505326883),
        (0.6952031542, 1.7990599282, 0.9133515354),
    ),
    "FairGrad(1)": (
        FairGrad(alpha=1.0, scale="paper"),
        (0.9192110608, 0.7505326883),
        (0.6952031542, 1.7990599282, 0.9133515354),
    ),
    "FairGrad(2)": (
        FairGrad(alpha=2.0, scale="paper"),
        (0.8798234160, 0.6935362801),
        (0.675355305, 1.9515800484, 0.9339997007),
    ),
    "IMTLG": (IMTLG(scale="paper"), (0.5505102572, 0.4494897428), (0.2024191783, 0.5468941418, 0.2506866799)),
    "AlignedMTL": (
        AlignedMTL(scale="paper"),
        (0.5326237921, 0.4472135955),
        (0.1808839183, 0.4033137185, 0.2338608382),
    ),
    "ConFIG": (ConFIG(scale="paper"), (1.1123724357, 0.9082482905), (0.6840319182, 1.8481106981, 0.8471415207)),
    "UPGrad": (UPGrad(scale="paper"), (0.75, 2 / 3), (0.417562724, 0.8899728997, 0.4353789667)),
    "DualProj": (DualProj(scale="paper"), (0.5, 0.5), (1 / 3, 8 / 15, 1 / 3)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_coefficients(name: str) -> None:
    surgery, *golden = GOLDEN[name]
    for gramian_MM, expected in zip((G2, G3), golden, strict=True):
        assert surgery.coefficients(gramian_MM).tolist() == pytest.approx(expected, rel=0, abs=5.1e-11)


@pytest.mark.parametrize(
    "surgery", [PCGrad(scale="paper"), GradVac(beta=0.0, scale="paper")], ids=["PCGrad", "GradVac"]
)
def test_two_conflicting_rows_have_one_order(surgery: PCGrad | GradVac) -> None:
    assert surgery.coefficients(G2).tolist() == pytest.approx((1.5, 4 / 3), rel=1e-15)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_equal_rows_give_the_row(make_surgery, num_rows: int, size: float) -> None:
    row = size * torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    surgery = make_surgery()
    for _ in range(3):  # what it remembers changes nothing
        found = surgery(row.expand(num_rows, -1))
        torch.testing.assert_close(found, row, rtol=1e-12, atol=1e-12 * size)


def test_equal_rows_of_absent_neighbours_give_the_row(make_surgery) -> None:
    row = torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    surgery = make_surgery()
    for tasks in ([0, 1], [1, 5], [2], [0, 2, 5]):
        torch.testing.assert_close(surgery(row.expand(len(tasks), -1), tasks), row, rtol=1e-12, atol=1e-12)


def test_only_the_rows_that_are_present_matter(make_surgery) -> None:
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(make_surgery()(rows, [0, 1, 2]), make_surgery()(rows))


def test_float32_rows_come_back_in_float32(make_surgery) -> None:
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found: Tensor = make_surgery()(rows.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), make_surgery()(rows), rtol=1e-4, atol=1e-5)
