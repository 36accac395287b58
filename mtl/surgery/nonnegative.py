"""Convex quadratic problems over non-negative variables: the projections and least norms of gradient surgery.

Shape suffix: K variables, one for each row that has a direction.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

# Added to the diagonal of C and taken out again by proximal steps: singular problems, as of tasks that occur twice,
# keep a unique solution, and each step a system that can be solved. It shrinks tenfold at each step, because it slows
# nearly singular problems down, to where the rounding of C begins.
FIRST_PROXIMAL, LAST_PROXIMAL = 1e-8, 1e-13
MAX_PROXIMAL_STEPS = 60
ROUNDING = 1e-14
EPSILON = float(np.finfo(np.float64).eps)
# Steps without progress before exchanges of many variables give way to those of one.
PATIENCE = 3


def nonnegative_qp(c_KK: Matrix, q_K: Vector, *, stop_below: float = -math.inf) -> Vector:
    """``argmin x^T C x / 2 - q^T x`` over ``x >= 0``, for a positive semi-definite C with ones on its diagonal.

    At the solution ``C x >= q``, with equality where ``x > 0``, each to about 1e-14 of the largest q plus 1e-16 of the
    sum of x, the rounding of C. Without a lower bound (some ``x >= 0`` has ``C x = 0`` and ``q^T x > 0``) the result is
    a large multiple of such an x.

    Source: proximal point iteration (Rockafellar, "Monotone operators and the proximal point algorithm", SIAM J.
    Control 14, 1976) around :func:`strictly_convex`.

    Args:
        c_KK: C.
        q_K: q.
        stop_below: Return as soon as the objective is below it.
    """
    x_K = np.zeros(len(q_K))
    size = q_K.max(initial=0.0)
    if size == 0:
        return x_K
    proximal = FIRST_PROXIMAL
    active_K = q_K > 0
    for _ in range(MAX_PROXIMAL_STEPS):
        regular_KK = c_KK + proximal * np.eye(len(q_K))
        new_K, active_K, solved = strictly_convex(regular_KK, q_K + proximal * x_K, active_K)
        if not solved and proximal < FIRST_PROXIMAL:
            break  # rounding has the exchanges go in circles: the solution before is as good as it gets
        moved = proximal * np.abs(new_K - x_K).max()
        proximal = max(proximal / 10, LAST_PROXIMAL)
        x_K = new_K
        if moved <= ROUNDING * size or x_K @ (c_KK @ x_K / 2 - q_K) < stop_below:
            break
    return x_K


def strictly_convex(a_KK: Matrix, q_K: Vector, active_K: NDArray[np.bool_]) -> tuple[Vector, NDArray[np.bool_], bool]:
    """``argmin x^T A x / 2 - q^T x`` over ``x >= 0`` for a positive definite A, which x are not held at 0, and success.

    Every step solves for the active variables and then exchanges all that break a condition (an active one below 0, a
    gradient below 0 at one that is not active). Where that does not bring their number down, as with many more rows
    than they have dimensions, :func:`one_by_one` goes on from there.

    Source: block principal pivoting, Judice and Pires, Computers & Operations Research 21 (1994), Fig. 1, with another
    way out.

    Args:
        a_KK: A.
        q_K: q.
        active_K: Where to begin.
    """
    active_K = active_K.copy()
    fewest, patience = len(q_K) + 1, PATIENCE
    while True:
        x_K = solution(a_KK, q_K, active_K)
        broken_K = np.where(active_K, x_K < 0, a_KK @ x_K - q_K < -tolerance(q_K, x_K))
        num_broken = int(broken_K.sum())
        if num_broken == 0:
            return x_K, active_K, True
        if num_broken < fewest:
            fewest, patience = num_broken, PATIENCE
        elif patience == 0:
            return one_by_one(a_KK, q_K, active_K & (x_K > 0))
        else:
            patience -= 1
        active_K ^= broken_K


def one_by_one(a_KK: Matrix, q_K: Vector, active_K: NDArray[np.bool_]) -> tuple[Vector, NDArray[np.bool_], bool]:
    """The same, where every step lets one variable in, the one of the lowest gradient, and lowers the objective.

    Source: Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23, algorithm NNLS.
    """
    active_K = active_K.copy()
    while True:
        x_K = solution(a_KK, q_K, active_K)
        if (x_K >= 0).all():
            break
        active_K &= x_K > 0
    barred_K = np.zeros_like(active_K)  # those that rounding threw out again at once
    for _ in range(10 * len(q_K)):
        gradient_K = np.where(active_K | barred_K, 0.0, a_KK @ x_K - q_K)
        entering = int(gradient_K.argmin())
        if gradient_K[entering] >= -tolerance(q_K, x_K):
            return x_K, active_K, not barred_K.any()
        active_K[entering] = True
        target_K = solution(a_KK, q_K, active_K)
        if target_K[entering] > 0:
            barred_K[:] = False
        else:
            barred_K[entering] = True
        while (target_K[active_K] <= 0).any():
            (falling,) = np.nonzero(active_K & (target_K <= 0))
            parts = x_K[falling] / (x_K[falling] - target_K[falling])  # of the way, until they come to 0
            active_K[falling[parts == parts.min()]] = False
            x_K = np.where(active_K, x_K + parts.min() * (target_K - x_K), 0.0)
            target_K = solution(a_KK, q_K, active_K)
        x_K = target_K
    return x_K, active_K, False


def solution(a_KK: Matrix, q_K: Vector, active_K: NDArray[np.bool_]) -> Vector:
    """x of gradient 0 at the active variables, and 0 at the others."""
    x_K = np.zeros(len(q_K))
    if active_K.any():
        x_K[active_K] = np.linalg.solve(a_KK[np.ix_(active_K, active_K)], q_K[active_K])
    return x_K


def tolerance(q_K: Vector, x_K: Vector) -> float:
    """How far below 0 rounding may take a gradient."""
    size: float = ROUNDING * q_K.max(initial=0.0) + EPSILON * np.abs(x_K).sum()
    return size
