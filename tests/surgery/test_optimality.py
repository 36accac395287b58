"""Solutions of 500 problems meet their optimality conditions.

A Gramian in float64 has each ``<g_i, g_j>`` to about ``EPSILON |g_i| |g_j|``, and so the products ``(G w)_i`` of a
combination only to ``EPSILON |g_i| sum_j w_j |g_j|``. Where its rows nearly cancel out that is more than 1e-8 of what a
condition compares, whatever solves it. Three tests allow for that, and say how: those of MGDA (such a problem counts as
Pareto-stationary), of FairGrad (``(G w)_i`` cannot be evaluated better) and of GradVac.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

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
from mtl.surgery.gradvac import vaccinate
from mtl.surgery.pcgrad import random_orders

EPSILON = float(np.finfo(np.float64).eps)
# |d| / sum w |g| of the shortest convex combination, below which rounding decides about its direction; and, since its
# square is what (G w)_i / (|g_i| sum w |g|) can be, about whether FairGrad's equations have a solution.
STATIONARY, UNSOLVABLE = 1e-7, 1e-6

Rows = NDArray[np.float64]


def solved(surgery, rows: Rows) -> Rows:
    """The coefficients."""
    return surgery.coefficients(gramian(torch.from_numpy(rows))).numpy()


def norms(rows: Rows) -> Rows:
    return np.linalg.norm(rows, axis=1)


def stationarity(rows: Rows) -> float:
    """0 at a Pareto-stationary point: the length of the shortest convex combination, as a share of its parts'."""
    weights = solved(MGDA(), rows)
    return float(np.linalg.norm(weights @ rows) / (weights @ norms(rows)))


def test_problems_are_of_all_kinds(hard_problems) -> None:
    assert {len(rows) for rows in hard_problems} == set(range(2, 17))
    assert sum(bool((rows @ rows.T < 0).any()) for rows in hard_problems) > 350
    assert 20 < sum(stationarity(rows) <= STATIONARY for rows in hard_problems) < 60
    spread = [norms(rows).max() / norms(rows).min() for rows in hard_problems]
    assert max(spread) > 1e5
    assert sum(np.linalg.cond(rows @ rows.T) > 1e12 for rows in hard_problems) > 100


def test_mgda_is_the_shortest_convex_combination(hard_problems) -> None:
    for rows in hard_problems:
        weights = solved(MGDA(scale="paper"), rows)
        assert (weights >= 0).all()
        assert weights.sum() == pytest.approx(1, rel=0, abs=1e-12)
        d = weights @ rows
        length = np.linalg.norm(d)
        if length > STATIONARY * (weights @ norms(rows)):
            assert ((length**2 - rows @ d) / (norms(rows) * length)).max() <= 1e-8


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_cagrad_has_no_duality_gap(c: float, hard_problems) -> None:
    for rows in hard_problems:
        mean = rows.mean(axis=0)
        d = solved(CAGrad(c=c, scale="paper"), rows) @ rows
        assert np.linalg.norm(d - mean) <= c * np.linalg.norm(mean) * (1 + 1e-9)
        added = solved(CAGrad(c=c, scale="paper"), rows) - 1 / len(rows)
        assert added.min() >= -1e-15
        weights = np.maximum(added, 0) / np.maximum(added, 0).sum()
        dual = weights @ rows @ mean + c * np.linalg.norm(mean) * np.linalg.norm(weights @ rows)
        assert abs(dual - (rows @ d).min()) <= 1e-8 * np.linalg.norm(mean) * norms(rows).max()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equations(alpha: float, hard_problems) -> None:
    num_exact = 0
    for rows in hard_problems:
        inner = rows @ rows.T
        weights = solved(FairGrad(alpha=alpha, scale="paper"), rows)
        if not weights.any():
            assert stationarity(rows) <= UNSOLVABLE
            continue
        assert (weights > 0).all()
        powers = weights ** (1 / alpha)
        rounding = len(rows) * EPSILON * powers * (np.abs(inner) @ weights)
        num_exact += bool((rounding <= 1e-8).all())
        assert (np.abs(powers * (inner @ weights) - 1) <= 1e-8 + rounding).all()
    assert num_exact > 370


def test_nash_is_fairgrad_of_alpha_1(hard_problems) -> None:
    for rows in hard_problems:
        expected = solved(FairGrad(alpha=1.0, scale="paper"), rows)
        np.testing.assert_allclose(solved(NashMTL(scale="paper"), rows), expected, rtol=1e-9)


def test_dualproj_meets_the_conditions_of_the_projection(hard_problems) -> None:
    for rows in hard_problems:
        check_projection(rows, solved(DualProj(scale="paper"), rows), np.full(len(rows), 1 / len(rows)))


def test_upgrad_meets_the_conditions_of_the_projections(hard_problems) -> None:
    """It is the mean of the projections of single rows, each the solution of its own problem."""
    for rows in hard_problems:
        cosines, lengths = cosines_of(rows)
        total = solved(UPGrad(scale="paper"), rows)
        assert (total >= (1 - 1e-12) / len(rows)).all()
        assert (cosines @ (total * lengths)).min() >= -1e-8 * lengths.max()


def test_upgrad_of_a_row_that_alone_conflicts_is_its_projection(hard_problems) -> None:
    """Lengths that leave one row's part only: the others' vanish from the sum but stay as conditions."""
    for rows in hard_problems[::5]:
        units = rows / norms(rows)[:, None]
        lengths = np.full(len(rows), 1e-9)
        lengths[0] = 1
        found = solved(UPGrad(scale="paper"), units * lengths[:, None]) * len(rows)
        only_first = np.eye(len(rows))[0]
        check_projection(units, found * lengths, only_first, tolerance=1e-7)


def check_projection(rows: Rows, found: Rows, start: Rows, tolerance: float = 1e-8) -> None:
    """``v >= u``, ``G v >= 0`` and ``(v - u)^T G v = 0``, in terms of the unit rows."""
    cosines, lengths = cosines_of(rows)
    unit = lengths.max()
    added, gains = (found - start) * lengths / unit, cosines @ (found * lengths / unit)
    assert added.min() >= -tolerance
    assert gains.min() >= -tolerance
    assert abs(added @ gains) <= tolerance


def cosines_of(rows: Rows) -> tuple[Rows, Rows]:
    lengths = norms(rows)
    return rows @ rows.T / lengths[:, None] / lengths, lengths


def test_pcd_meets_the_conditions_of_its_problem(hard_problems) -> None:
    for index, rows in enumerate(hard_problems):
        primary = [0] if index % 2 else [0, len(rows) - 1]
        tau = (0.0, 0.02, 0.5)[index % 3]
        found = solved(PCD(primary, tau=tau), rows)
        lengths, d = norms(rows), found @ rows
        unit = lengths.max()
        multipliers = (found - 1 / len(rows))[primary] * lengths[primary]
        assert multipliers.min() >= -1e-12 * unit
        slack = (rows @ d)[primary] / lengths[primary]
        # Primary tasks that are nearly opposed may be spared harm only.
        if len(primary) == 1 or rows[0] @ rows[-1] > -0.98 * lengths[0] * lengths[-1]:
            slack -= tau * lengths[primary]
            assert abs(multipliers @ slack) <= 1e-8 * unit**2
        assert slack.min() >= -1e-8 * unit
        others = np.delete(found, primary)
        np.testing.assert_allclose(others, 1 / len(rows), rtol=1e-14)


def project_rows(rows: Rows, orders: Rows) -> Rows:
    """PCGrad on the gradients themselves."""
    projected = []
    for row, order in zip(rows, orders, strict=True):
        gradient = row.copy()
        for j in order:
            inner = gradient @ rows[j]
            if inner < 0:
                gradient -= inner / (rows[j] @ rows[j]) * rows[j]
        projected.append(gradient)
    return np.stack(projected)


def turn_rows(rows: Rows, orders: Rows, usual: Rows, beta: float) -> tuple[Rows, Rows, float]:
    """GradVac on the gradients themselves: the turned rows, the new cosines, and how little is left where it turns.

    That is the smallest share of a row's length, or sine of its angle to another, from which a turn was made.
    """
    turned, usual, least = [], usual.copy(), 1.0
    for i, (row, order) in enumerate(zip(rows, orders, strict=True)):
        gradient = row.copy()
        for j in order:
            length, other = np.linalg.norm(gradient), np.linalg.norm(rows[j])
            least = min(least, length / np.linalg.norm(row))
            cosine = float(np.clip(gradient @ rows[j] / (length * other), -1, 1)) if length else 0.0
            phi = usual[i, j]
            if length and cosine < phi:
                sine, usual_sine = math.sqrt(1 - cosine**2), math.sqrt(1 - phi**2)
                least = min(least, sine)
                gradient = gradient + length * (phi * sine - cosine * usual_sine) / (other * usual_sine) * rows[j]
            usual[i, j] = (1 - beta) * phi + beta * cosine
        turned.append(gradient)
    return np.stack(turned), usual, least


def test_pcgrad_equals_its_form_in_parameter_space(hard_problems) -> None:
    for seed, rows in enumerate(hard_problems):
        orders = random_orders(len(rows), torch.Generator().manual_seed(seed)).numpy()
        expected = project_rows(rows, orders).sum(axis=0)
        found = PCGrad(seed=seed, scale="paper")(torch.from_numpy(rows)).numpy()
        assert np.linalg.norm(found - expected) <= 1e-12 * norms(rows).sum()


@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_gradvac_equals_its_form_in_parameter_space(beta: float, hard_problems) -> None:
    """The Gramian has squares to EPSILON: what only has the share s of a length is known to EPSILON / s of it."""
    for seed, rows in enumerate(hard_problems):
        orders = random_orders(len(rows), torch.Generator().manual_seed(seed)).numpy()
        expected, _, _ = turn_rows(rows, orders, np.zeros(2 * [len(rows)]), beta)
        found = GradVac(beta=beta, seed=seed, scale="paper")(torch.from_numpy(rows)).numpy()
        assert np.linalg.norm(found - expected.sum(axis=0)) <= 1e-12 * norms(rows).sum()

        usual = np.random.default_rng(seed).uniform(-0.9, 0.9, size=2 * [len(rows)])
        expected, expected_usual, least = turn_rows(rows, orders, usual, beta)
        coefficients, found_usual = vaccinate(
            gramian(torch.from_numpy(rows)), torch.from_numpy(orders), torch.from_numpy(usual), beta
        )
        found = coefficients.sum(dim=0).numpy() @ rows
        tolerance = max(1e-12, 10 * EPSILON / max(least, 1e-8))
        assert np.linalg.norm(found - expected.sum(axis=0)) <= tolerance * norms(rows).sum()
        if least > 1e-2:
            np.testing.assert_allclose(found_usual.numpy(), expected_usual, rtol=0, atol=1e-10)


def test_imtl_g_is_never_uphill(hard_problems) -> None:
    for rows in hard_problems:
        d = solved(IMTLG(scale="paper"), rows) @ rows
        products = rows @ d / norms(rows)
        assert products.max() >= 0
        if np.linalg.cond(cosines_of(rows)[0]) < 1e8:
            assert products.min() > 0
            np.testing.assert_allclose(products, products[0], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_imtl_g_goes_downhill_where_the_paper_goes_uphill(size: float) -> None:
    cosines = np.array([[1, 0.9, 0.5], [0.9, 1, 0.8], [0.5, 0.8, 1]])
    lengths = np.array([1, size, 1])
    inner = torch.from_numpy(lengths[:, None] * cosines * lengths)
    paper = torch.linalg.solve(inner, torch.from_numpy(lengths))
    assert (float(paper.sum()) < 0) == (size == 1e-2)
    assert (inner @ IMTLG().coefficients(inner) > 0).all()


NEVER_ZERO = [
    (MGDA(), STATIONARY),
    (CAGrad(), STATIONARY),
    (NashMTL(), UNSOLVABLE),
    (FairGrad(), UNSOLVABLE),
    (FairGrad(alpha=5.0), UNSOLVABLE),
    (UPGrad(), STATIONARY),
    (DualProj(), STATIONARY),
    (AlignedMTL(), STATIONARY),
    (PCGrad(), STATIONARY),
    (GradVac(), STATIONARY),
    (PCD(0), STATIONARY),
    (SDMGrad(), STATIONARY),
    (ConFIG(), UNSOLVABLE),
    (IMTLG(), UNSOLVABLE),
]


@pytest.mark.parametrize(("surgery", "threshold"), NEVER_ZERO, ids=lambda value: type(value).__name__)
def test_the_result_is_finite_and_not_0_away_from_stationary_points(surgery, threshold: float, hard_problems) -> None:
    for rows in hard_problems:
        weights = solved(surgery, rows)
        assert np.isfinite(weights).all()
        d = weights @ rows
        assert np.isfinite(d).all()
        if stationarity(rows) > threshold and np.linalg.norm(rows.mean(axis=0)) > 1e-12 * norms(rows).mean():
            assert d.any()
