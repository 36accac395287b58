"""Surgery that protects chosen tasks. Shape suffixes: M present tasks, K rows that are not 0, P of primary tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mtl.surgery.cosine_space import CosineSpace
from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.nonnegative import nonnegative_qp
from mtl.surgery.scale import Scale, check_scale

# Coefficients that add up to more than this many times what they would for orthogonal primary tasks are those of tasks
# that nearly exclude each other (two at a cosine of -0.99): following all of them would take a very long step.
MAX_SUM = 100.0


class PCD(GramianSurgery):
    """The vector nearest to the mean gradient that gives each primary task its due:

    ``argmin |d - g_0|`` subject to ``<g_j, d> >= tau |g_j|^2`` for every primary task j that is present. ``tau`` is a
    share of what a step along the task's own gradient would gain; 0 only rules out harm. Where no primary task is
    present the result is the mean. Primary tasks that are too much opposed for tau are given what ``tau = 0`` gives.

    Solved exactly: ``d = g_0 + sum_j v_j g_j``, where the coefficients ``x_j = v_j |g_j|`` of the unit rows are
    ``argmin x^T C x / 2 - q^T x`` over ``x >= 0``, with ``q_j = (tau |g_j|^2 - <g_j, g_0>) / |g_j|``.

    Source: Varam and AlHajri, "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
    Multi-Objective Optimization", TMLR 2026, arXiv 2606.29521. There the one primary gradient is followed, and the
    constraints are those of all other tasks, with gradients divided by a running mean of their norms; here the mean
    gradient is followed and the primary tasks are the constraints, which holds for tasks that must not get worse.

    Args:
        primary: Name or index of the task to protect, or several of them; the first task if not given.
        tau: Share that each primary task is due, in [0, 1].
        names: Names of the tasks; needed to read a name.
        scale: ``"mean"`` and ``"paper"`` are the same here: equal rows give that row.

    Raises:
        ValueError: If a primary task is unknown or there is none, or another argument is outside its range.
    """

    weights_act = "partly"

    def __init__(
        self,
        primary: str | int | Sequence[str | int] = 0,
        tau: float = 0.02,
        names: Sequence[str] | None = None,
        scale: Scale = "mean",
    ) -> None:
        if not 0 <= tau <= 1:
            raise ValueError(f"tau: must be a share in [0, 1], found {tau}; 0 only rules out harm, 0.02 is usual")
        check_scale(scale)
        self._primary = indices_of(primary, names)
        self._tau = tau

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        tasks = range(len(gramian_MM)) if tasks is None else tasks
        space = CosineSpace.of(gramian_MM)
        mean_K = space.norms_K / space.num_rows  # of the unit rows
        protected = np.array([tasks[row] in self._primary for row in space.kept], dtype=bool)
        cosines_PP = space.cosines_KK[np.ix_(protected, protected)]
        gains_P = (space.cosines_KK @ mean_K)[protected]  # <g_j, g_0> / |g_j|
        added_P = smallest_addition(cosines_PP, gains_P, self._tau * space.norms_K[protected])
        coefficients_K = np.full(len(space.kept), 1 / space.num_rows)
        coefficients_K[protected] += np.divide(added_P, space.norms_K[protected])
        return space.all_rows(coefficients_K)


def smallest_addition(
    cosines_PP: NDArray[np.float64], gains_P: NDArray[np.float64], due_P: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Coefficients of the primary unit rows that raise their gains to what is due, or else to 0."""
    added_P = nonnegative_qp(cosines_PP, due_P - gains_P)
    if added_P.sum() <= MAX_SUM * np.maximum(due_P - gains_P, 0.0).sum():
        return added_P
    return nonnegative_qp(cosines_PP, -gains_P)


def indices_of(primary: str | int | Sequence[str | int], names: Sequence[str] | None) -> frozenset[int]:
    """The tasks' indices, checked."""
    chosen = [primary] if isinstance(primary, str | int) else list(primary)
    if not chosen:
        raise ValueError("primary: must be at least one task, found none; take mtl.surgery.Mean to protect none")
    known = None if names is None else list(names)
    found = set()
    for task in chosen:
        if isinstance(task, str):
            if known is None:
                raise ValueError("names: must be given to find a task by name, found None; pass the tasks' names")
            if task not in known:
                raise ValueError(f"primary: must be a task of the run, found {task!r}; the tasks are {known}")
            found.add(known.index(task))
        elif task < 0 or (known is not None and task >= len(known)):
            last = "" if known is None else f" to {len(known) - 1}"
            raise ValueError(f"primary: must be an index from 0{last}, found {task}; or give the task's name")
        else:
            found.add(task)
    return frozenset(found)
