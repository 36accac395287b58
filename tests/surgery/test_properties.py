"""What each surgery does to lengths, orders, agreement and conflict, and what loss weights do through it."""

from __future__ import annotations

from functools import partial

import numpy as np
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
    GradDrop,
    GradVac,
    Mean,
    NashMTL,
    PCGrad,
    SDMGrad,
    UPGrad,
    gramian,
)
from mtl.surgery.gradvac import vaccinate
from mtl.surgery.pcgrad import random_orders


def random_problems() -> list[Tensor]:
    """Rows of 2 to 8 tasks: random, conflicting, of a common part, and of norms over four decades; of full rank."""
    generator = np.random.default_rng(0)
    problems = []
    for index in range(150):
        rows = generator.normal(size=(2 + index // 4 % 7, 40))
        if index % 4 == 1:
            rows -= 0.9 * rows.mean(axis=0)
        elif index % 4 == 2:
            rows += generator.normal(size=40)
        elif index % 4 == 3:
            rows = (rows - 0.9 * rows.mean(axis=0)) * 10 ** generator.uniform(-2, 2, size=(len(rows), 1))
        problems.append(torch.from_numpy(rows))
    return problems


PROBLEMS = random_problems()
FAIR = {"FairGrad(0.5)": 0.5, "FairGrad(2)": 2.0, "FairGrad(5)": 5.0}


@pytest.mark.parametrize(
    ("make", "degree"),
    [
        (MGDA, 1),
        (CAGrad, 1),
        (NashMTL, 0),
        *((partial(FairGrad, alpha), (1 - alpha) / (1 + alpha)) for alpha in (0.5, 1.0, 2.0, 5.0)),
        (UPGrad, 1),
        (DualProj, 1),
        (AlignedMTL, 1),
        (ConFIG, 1),
        (IMTLG, 1),
        (PCGrad, 1),
        (GradVac, 1),
        (partial(PCD, primary=0), 1),
        (SDMGrad, 1),
    ],
)
def test_longer_rows_give_a_longer_vector_by_the_degree(make, degree: float) -> None:
    for rows in PROBLEMS[::5]:
        for factor in (1e-3, 50.0):
            expected = factor**degree * make(scale="paper")(rows)
            found = make(scale="paper")(factor * rows)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * float(expected.norm()))


def test_in_the_scale_of_the_mean_every_method_has_degree_1(make_surgery) -> None:
    for rows in PROBLEMS[::5]:
        expected = 50 * make_surgery()(rows)
        torch.testing.assert_close(make_surgery()(50 * rows), expected, rtol=1e-6, atol=1e-8 * float(expected.norm()))


def lengths_for(rows: Tensor) -> Tensor:
    exponents = torch.linspace(-1, 1, len(rows), dtype=torch.float64)
    return (10**exponents)[:, None]


def test_nash_does_not_feel_the_scale_of_a_loss() -> None:
    for rows in PROBLEMS:
        expected = NashMTL(scale="paper")(rows)
        torch.testing.assert_close(NashMTL(scale="paper")(lengths_for(rows) * rows), expected, rtol=1e-7, atol=1e-9)
        assert float(expected.norm()) == pytest.approx(len(rows) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("make", [NashMTL, ConFIG, IMTLG, partial(FairGrad, 1.0)])
def test_the_direction_does_not_depend_on_the_scale_of_a_loss(make) -> None:
    for rows in PROBLEMS:
        assert cosine(make()(rows), make()(lengths_for(rows) * rows)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("make", [Mean, MGDA, CAGrad, partial(FairGrad, 2.0), UPGrad, DualProj, AlignedMTL, SDMGrad])
def test_the_direction_depends_on_the_scale_of_a_loss(make) -> None:
    assert min(cosine(make()(rows), make()(lengths_for(rows) * rows)) for rows in PROBLEMS) < 0.9


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_gradvac_commutes_with_loss_weights() -> None:
    for seed, rows in enumerate(PROBLEMS):
        orders = random_orders(len(rows), torch.Generator().manual_seed(seed))
        usual = torch.rand(len(rows), len(rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2
        plain, plain_usual = vaccinate(gramian(rows), orders, usual, 0.3)
        weights = lengths_for(rows)
        found, found_usual = vaccinate(gramian(weights * rows), orders, usual, 0.3)
        torch.testing.assert_close(found @ (weights * rows), weights * (plain @ rows), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_usual, plain_usual, rtol=1e-9, atol=1e-12)


def test_gradvac_turns_to_the_usual_cosine() -> None:
    rows = PROBLEMS[0][:2]
    usual = torch.full((2, 2), 0.4, dtype=torch.float64)
    turned = vaccinate(gramian(rows), torch.tensor([[1], [0]]), usual, 0.1)[0] @ rows
    assert cosine(turned[0], rows[1]) == pytest.approx(0.4, rel=1e-12)
    assert cosine(turned[1], rows[0]) == pytest.approx(0.4, rel=1e-12)


def test_gradvac_with_beta_0_is_pcgrad() -> None:
    for seed, rows in enumerate(PROBLEMS):
        expected = PCGrad(seed=seed).coefficients(gramian(rows))
        torch.testing.assert_close(
            GradVac(beta=0.0, seed=seed).coefficients(gramian(rows)), expected, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize(
    "surgery",
    [
        Mean(),
        MGDA(),
        CAGrad(),
        NashMTL(),
        FairGrad(0.5),
        FairGrad(5.0),
        UPGrad(),
        DualProj(),
        AlignedMTL(),
        ConFIG(),
        IMTLG(),
    ],
    ids=lambda surgery: type(surgery).__name__,
)
def test_the_order_of_the_tasks_does_not_matter(surgery) -> None:
    for seed, rows in enumerate(PROBLEMS):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        found, expected = surgery.coefficients(gramian(rows[order])), surgery.coefficients(gramian(rows))[order]
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


def test_rotating_the_parameters_rotates_the_result(make_surgery) -> None:
    if isinstance(make_surgery(), GradDrop):
        pytest.skip("works on every parameter by itself")
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for rows in PROBLEMS[::10]:
        expected = make_surgery()(rows) @ rotation
        found = make_surgery()(rows @ rotation)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8 * float(expected.norm()))


@pytest.mark.parametrize(
    "surgery",
    [Mean(), PCGrad(), GradVac(beta=0.0), UPGrad(), DualProj(), CAGrad(c=0.0), PCD(0, tau=0.0)],
    ids=lambda surgery: type(surgery).__name__,
)
def test_without_conflict_it_is_the_mean(surgery) -> None:
    rows = torch.rand(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert (gramian(rows) > 0).all()
    torch.testing.assert_close(surgery(rows), rows.mean(dim=0), rtol=1e-13, atol=1e-14)


def worst_cosine(surgery) -> list[float]:
    return [float(((rows @ d) / (rows.norm(dim=1) * d.norm())).min()) for rows in PROBLEMS for d in [surgery(rows)]]


@pytest.mark.parametrize(
    "surgery",
    [MGDA(), CAGrad(c=1.0), NashMTL(), FairGrad(0.5), FairGrad(5.0), UPGrad(), DualProj(), ConFIG(), IMTLG()],
    ids=lambda surgery: type(surgery).__name__,
)
def test_no_task_is_hurt(surgery) -> None:
    assert min(worst_cosine(surgery)) >= -1e-9


@pytest.mark.parametrize(
    "surgery",
    [Mean(), CAGrad(c=0.1), PCGrad(), GradVac(), AlignedMTL(), SDMGrad(), PCD(0)],
    ids=lambda surgery: type(surgery).__name__,
)
def test_a_task_may_be_hurt(surgery) -> None:
    assert min(worst_cosine(surgery)) < -1e-3


def coefficients(surgery) -> list[Tensor]:
    return [surgery.coefficients(gramian(rows)) for rows in PROBLEMS]


@pytest.mark.parametrize(
    ("surgery", "least"),
    [
        (MGDA(scale="paper"), 0.0),
        (NashMTL(scale="paper"), 1e-300),
        (FairGrad(0.5, scale="paper"), 1e-300),
        (FairGrad(5.0, scale="paper"), 1e-300),
        (PCGrad(scale="paper"), 1.0),
        (GradVac(scale="paper"), 1.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_coefficients_are_not_below_a_bound(surgery, least: float) -> None:
    assert min(float(found.min()) for found in coefficients(surgery)) >= least


@pytest.mark.parametrize(
    "surgery", [CAGrad(scale="paper"), UPGrad(), DualProj(), PCD(0)], ids=lambda s: type(s).__name__
)
def test_coefficients_are_at_least_those_of_the_mean(surgery) -> None:
    assert all((found >= 1 / len(found) - 1e-15).all() for found in coefficients(surgery))


@pytest.mark.parametrize("surgery", [MGDA(), IMTLG(), AlignedMTL(), SDMGrad()], ids=lambda s: type(s).__name__)
def test_coefficients_add_up_to_1(surgery) -> None:
    sums = torch.stack([found.sum() for found in coefficients(surgery)])
    if isinstance(surgery, AlignedMTL):
        assert (sums < 1).any()  # shorter rows: only the least singular value is kept
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-9, atol=0)


@pytest.mark.parametrize("surgery", [IMTLG(), ConFIG(), AlignedMTL()], ids=lambda s: type(s).__name__)
def test_coefficients_may_be_negative(surgery) -> None:
    assert min(float(found.min()) for found in coefficients(surgery)) < 0


def test_mgda_is_not_longer_than_any_row() -> None:
    assert all(MGDA()(rows).norm() <= rows.norm(dim=1).min() * (1 + 1e-12) for rows in PROBLEMS)


def test_two_tasks_have_closed_forms() -> None:
    for rows in PROBLEMS:
        pair = rows[:2]
        (a, b), (_, c) = gramian(pair).tolist()
        first = min(max((c - b) / (a + c - 2 * b), 0.0), 1.0)
        assert MGDA().coefficients(gramian(pair)).tolist() == pytest.approx([first, 1 - first], rel=1e-9, abs=1e-12)
        torch.testing.assert_close(UPGrad()(pair), PCGrad()(pair), rtol=1e-9, atol=1e-12)


def test_aligned_rows_are_orthogonal_and_equally_long() -> None:
    """For one task's preference the combination is a row of the aligned matrix; the mean is the mean of these."""
    for rows in PROBLEMS:
        values, vectors = torch.linalg.eigh(gramian(rows))
        aligned = values[0].sqrt() * vectors @ (vectors.T @ rows / values.sqrt()[:, None])
        gram = gramian(aligned)
        torch.testing.assert_close(gram, values[0] * torch.eye(len(rows), dtype=torch.float64), rtol=1e-6, atol=1e-6)
        found = AlignedMTL()(rows)
        torch.testing.assert_close(found, aligned.mean(dim=0), rtol=1e-6, atol=1e-8 * float(found.norm()))


def effect(make, units: Tensor) -> float:
    """What doubling the first row does to its part of the result, ``<d, g_1> / |g_1|``, relative to the others' mean.

    1 is in full, 0 not at all, below 0 the contrary: the logarithm to base 2. NaN where a task is hurt.
    """
    doubled = torch.ones(len(units), 1, dtype=torch.float64)
    doubled[0] = 2
    before, after = units @ make()(units), units @ make()(doubled * units)
    if min(before.min(), after.min()) <= 0:
        return float("nan")
    return float((after[0] / after[1:].mean() / (before[0] / before[1:].mean())).log2())


@pytest.mark.parametrize(
    "make",
    [
        Mean,
        MGDA,
        CAGrad,
        NashMTL,
        *(partial(FairGrad, alpha) for alpha in (0.5, 1.0, 2.0, 5.0)),
        UPGrad,
        DualProj,
        AlignedMTL,
        ConFIG,
        IMTLG,
        PCGrad,
        GradVac,
        partial(PCD, primary=0),
        SDMGrad,
        partial(SDMGrad, lambda_=2.0),
    ],
)
def test_loss_weights_act_as_stated(make) -> None:
    orthogonal = effect(make, torch.eye(6, 40, dtype=torch.float64))
    conflicting = [rows - 0.2 * rows.mean(dim=0) for rows in PROBLEMS[::4] if len(rows) > 2]
    found = np.array([effect(make, rows / rows.norm(dim=1, keepdim=True)) for rows in conflicting])
    found = found[np.isfinite(found)]
    assert len(found) > 15
    match make().weights_act:
        case "yes":  # and commutes with them, or has the mean as its expectation: tested by themselves
            assert orthogonal == pytest.approx(1, abs=1e-12)
            assert found.min() > 0.5
        case "partly":
            assert 0 <= orthogonal + 1e-9 <= 1 + 1e-8
            assert found.mean() > 0.1
        case "no":
            assert np.abs([orthogonal, *found]).max() < 1e-9
        case "reversed":
            assert max(orthogonal, found.max()) < -0.1
        case other:
            pytest.fail(f"unknown: {other}")
