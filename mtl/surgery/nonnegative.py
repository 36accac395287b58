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
    gradient below 0 at one that is not active); where that does not bring their number down for three steps, only the
    last of them, which ends after finitely many steps.

    Source: block principal pivoting, Judice and Pires, Computers & Operations Research 21 (1994), Fig. 1.

    Args:
        a_KK: A.
        q_K: q.
        active_K: Where to begin.
    """
    active_K = active_K.copy()
    size = q_K.max(initial=0.0)
    fewest, patience = len(q_K) + 1, 3
    x_K = np.zeros(len(q_K))
    for _ in range(100 + 10 * len(q_K)):
        x_K = np.zeros(len(q_K))
        if active_K.any():
            x_K[active_K] = np.linalg.solve(a_KK[np.ix_(active_K, active_K)], q_K[active_K])
        gradient_K = a_KK @ x_K - q_K
        tolerance = ROUNDING * size + EPSILON * np.abs(x_K).sum()
        broken_K = np.where(active_K, x_K < 0, gradient_K < -tolerance)
        num_broken = int(broken_K.sum())
        if num_broken == 0:
            return x_K, active_K, True
        if num_broken < fewest:
            fewest, patience = num_broken, 3
        elif patience > 0:
            patience -= 1
        else:
            last = np.flatnonzero(broken_K)[-1]
            broken_K = np.arange(len(q_K)) == last
        active_K ^= broken_K
    return np.maximum(x_K, 0.0), active_K, False
