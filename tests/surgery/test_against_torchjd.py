"""The same coefficients as TorchJD, where it is installed and its solvers are accurate."""

from __future__ import annotations

import numpy as np
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
    GradDrop,
    NashMTL,
    SDMGrad,
    UPGrad,
    gramian,
)
from mtl.surgery.gradvac import vaccinate
from mtl.surgery.pcgrad import project

aggregation = pytest.importorskip("torchjd.aggregation")


def problems(num_problems: int = 60) -> list[Tensor]:
    """Rows that are random, conflicting or of a common part, of lengths within one decade."""
    generator = np.random.default_rng(0)
    found = []
    for index in range(num_problems):
        rows = generator.normal(size=(2 + index % 7, 30))
        if index % 3 == 1:
            rows -= 0.9 * rows.mean(axis=0)
        elif index % 3 == 2:
            rows += generator.normal(size=30)
        found.append(torch.from_numpy(rows * generator.uniform(0.5, 3, size=(len(rows), 1))))
    return found


PROBLEMS = problems()


def assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# What limits the agreement: the routines for eigenvalues and the pseudo-inverse; the rate 1 / t of Frank and Wolfe in
# MGDA; the stopping rules of scipy in FairGrad and of Clarabel in CAGrad.
CASES = {
    "AlignedMTL": (AlignedMTL(), lambda: aggregation.AlignedMTLWeighting(), 1e-8),
    "AlignedMTL(median)": (AlignedMTL("median"), lambda: aggregation.AlignedMTLWeighting(scale_mode="median"), 1e-8),
    "AlignedMTL(rmse)": (AlignedMTL("rmse"), lambda: aggregation.AlignedMTLWeighting(scale_mode="rmse"), 1e-8),
    "IMTLG": (IMTLG(), lambda: aggregation.IMTLGWeighting(), 1e-8),
    "MGDA": (MGDA(), lambda: aggregation.MGDAWeighting(epsilon=1e-12, max_iters=20_000), 5e-3),
    "FairGrad(0.5)": (FairGrad(0.5, scale="paper"), lambda: aggregation.FairGradWeighting(alpha=0.5), 1e-4),
    "FairGrad(1)": (FairGrad(1.0, scale="paper"), lambda: aggregation.FairGradWeighting(alpha=1.0), 1e-4),
    "FairGrad(2)": (FairGrad(2.0, scale="paper"), lambda: aggregation.FairGradWeighting(alpha=2.0), 1e-4),
    "CAGrad": (CAGrad(c=0.5, scale="paper"), lambda: aggregation.CAGradWeighting(c=0.5), 1e-3),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_coefficients(name: str) -> None:
    surgery, make_weighting, tolerance = CASES[name]
    try:
        weighting = make_weighting()
    except ImportError as error:
        pytest.skip(str(error))
    for rows in PROBLEMS:
        assert_same(surgery.coefficients(gramian(rows)), weighting(gramian(rows)), tolerance)


def test_the_projections_without_what_is_added_to_the_diagonal() -> None:
    """By itself TorchJD adds 1e-4 of the trace, and is 2 % off."""
    try:
        projector = aggregation.UPGradWeighting().projector
    except ImportError as error:
        pytest.skip(str(error))
    projector.norm_eps, projector.reg_eps = 1e-12, 1e-12
    for rows in PROBLEMS:
        for surgery, kind in ((UPGrad(), aggregation.UPGradWeighting), (DualProj(), aggregation.DualProjWeighting)):
            expected = kind(projector=projector)(gramian(rows))
            assert_same(surgery.coefficients(gramian(rows)), expected, 1e-7)


def test_nash() -> None:
    for rows in PROBLEMS:
        try:
            aggregator = aggregation.NashMTL(n_tasks=len(rows), max_norm=0.0, optim_niter=100)
        except ImportError as error:
            pytest.skip(str(error))
        found, expected = NashMTL()(rows), aggregator(rows)
        assert float(found @ expected / (found.norm() * expected.norm())) > 1 - 1e-4


def test_config() -> None:
    for rows in PROBLEMS:
        assert_same(ConFIG(scale="paper")(rows), aggregation.ConFIG()(rows), 1e-9)


def drawn_orders(num_rows: int, *, with_itself: bool) -> Tensor:
    """The orders that TorchJD draws next from torch's generator."""
    orders = []
    for row in range(num_rows):
        if with_itself:
            orders.append([other for other in torch.randperm(num_rows).tolist() if other != row])
        else:
            others = [other for other in range(num_rows) if other != row]
            orders.append([others[index] for index in torch.randperm(num_rows - 1).tolist()])
    return torch.tensor(orders)


def test_pcgrad_with_the_same_orders() -> None:
    for seed, rows in enumerate(PROBLEMS):
        torch.manual_seed(seed)
        expected = aggregation.PCGradWeighting()(gramian(rows))
        torch.manual_seed(seed)
        found = project(gramian(rows), drawn_orders(len(rows), with_itself=True)).sum(dim=0)
        assert_same(found, expected, 1e-13)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_gradvac_with_the_same_orders_over_several_steps(beta: float) -> None:
    for seed, rows in enumerate(PROBLEMS):
        weighting = aggregation.GradVacWeighting(beta=beta, eps=0.0)
        usual = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for step in range(4):
            torch.manual_seed(10 * seed + step)
            expected = weighting(gramian(rows))
            torch.manual_seed(10 * seed + step)
            orders = drawn_orders(len(rows), with_itself=False)
            found, usual = vaccinate(gramian(rows), orders, usual, beta)
            assert_same(found.sum(dim=0), expected, 1e-10)


def test_sdmgrad_at_a_learning_rate_that_settles() -> None:
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        rows, others = (100 * torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
        others += rows  # two batches of the same tasks
        options = {"lr": 0.05, "momentum": 0.5, "n_iter": 20, "lambda_": 0.3}
        surgery, weighting = SDMGrad(**options), aggregation.SDMGradWeighting(**options)
        for inner in (gramian(rows), rows @ others.T, gramian(others)):
            assert_same(surgery.coefficients(inner), weighting(inner), 1e-7)


def test_sdmgrad_of_the_paper_at_its_own_learning_rate() -> None:
    for rows in PROBLEMS:
        surgery, weighting = SDMGrad(scale="paper"), aggregation.SDMGradWeighting()
        for factor in (100, 130, 90):
            assert_same(surgery.coefficients(gramian(factor * rows)), weighting(gramian(factor * rows)), 1e-5)


def test_graddrop_with_the_same_draws() -> None:
    for seed, rows in enumerate(PROBLEMS):
        leak = torch.linspace(0, 1, len(rows), dtype=torch.float64)
        names = [str(row) for row in range(len(rows))]
        torch.manual_seed(seed)
        expected = aggregation.GradDrop(leak=leak.float())(rows.float())
        surgery = GradDrop(dict(zip(names, leak.tolist(), strict=True)), names, seed=seed, scale="paper")
        torch.testing.assert_close(surgery(rows.float()), expected, rtol=1e-5, atol=1e-5)
