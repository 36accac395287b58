"""The quadratic problems under the projections and the shortest combinations meet their conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mtl.surgery import UPGrad, gramian
from mtl.surgery.nonnegative import nonnegative_qp, one_by_one, strictly_convex

Matrix = NDArray[np.float64]


def cosines(rows: Matrix) -> Matrix:
    lengths = np.linalg.norm(rows, axis=1)
    found = rows @ rows.T / lengths[:, None] / lengths
    np.fill_diagonal(found, 1.0)
    return found


def check(matrix: Matrix, q: Matrix, x: Matrix, tolerance: float = 1e-12) -> None:
    gradient, unit = matrix @ x - q, np.abs(q).max() + np.abs(x).max()
    assert x.min() >= 0
    assert gradient.min() >= -tolerance * unit
    assert np.abs(x * gradient).max() <= tolerance * unit**2


@pytest.mark.parametrize("num_columns", [28, 31, 32, 33, 40, 200])
def test_projections_of_64_rows_in_ever_fewer_dimensions(num_columns: int) -> None:
    """With half as many columns as rows, exchanging all variables at once goes in circles."""
    for seed in range(3):
        c = cosines(np.random.default_rng(seed).normal(size=(64, num_columns)))
        for q in (-c.mean(axis=1), -c[0]):
            check(c, q, nonnegative_qp(c, q))


def test_upgrad_is_the_mean_of_the_projections_of_single_rows(hard_problems) -> None:
    for rows in hard_problems[::3]:
        c, lengths = cosines(rows), np.linalg.norm(rows, axis=1)
        total = np.zeros(len(rows))
        for row, length in enumerate(lengths):
            added = nonnegative_qp(c, -c[row])
            check(c, -c[row], added, tolerance=1e-10)
            total += length * (np.eye(len(rows))[row] + added)
        expected = total / lengths / len(rows)
        found = UPGrad().coefficients(gramian(torch.from_numpy(rows))).numpy()
        apart = (found - expected) @ rows
        assert np.linalg.norm(apart) <= 1e-6 * lengths.max()


def test_one_by_one_ends_where_the_exchanges_do() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 20, 50):
        rows = generator.normal(size=(size, size + 3))
        a = cosines(rows) + 1e-3 * np.eye(size)
        q = generator.normal(size=size)
        for start in (q > 0, q < 0, np.ones(size, dtype=bool), np.zeros(size, dtype=bool)):
            for solve in (strictly_convex, one_by_one):
                x, active, success = solve(a, q, start)
                assert success
                assert (active == (x > 0)).all()
                check(a, q, x)


def test_without_gain_the_solution_is_0() -> None:
    assert nonnegative_qp(np.eye(3), np.array([-1.0, 0.0, -2.0])).tolist() == [0, 0, 0]
