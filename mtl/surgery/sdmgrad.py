"""A short combination, led towards the mean. Shape suffix: M present tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.scale import Scale, check_scale
from mtl.surgery.task_coefficients import TaskCoefficients


def onto_simplex(values_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest point whose entries are not negative and sum to 1.

    Source: Held, Wolfe and Crowder, "Validation of subgradient optimization", Math. Programming 6 (1974).
    """
    sorted_M = np.sort(values_M)[::-1]
    shifts_M = (np.cumsum(sorted_M) - 1) / np.arange(1, len(values_M) + 1)
    shift = shifts_M[np.flatnonzero(sorted_M > shifts_M)[-1]]
    found: NDArray[np.float64] = np.maximum(values_M - shift, 0.0)
    return found


class SDMGrad(GramianSurgery):
    """``d = J^T (w + lambda u) / (1 + lambda)``, u the mean: a short combination that is pulled towards the mean.

    w goes towards ``argmin |J^T (w + lambda u)|^2`` on the simplex: each call takes ``n_iter`` steps of projected
    gradient descent with momentum, from where the last one left it. ``lambda = 0`` is MGDA, a large one the mean.

    Source: Xiao, Ban and Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms",
    NeurIPS 2023, Algorithm 1. Deviations: the paper takes ``J_1 J_2^T`` of two independent batches, and d from a third;
    a step has only one, whose Gramian is larger on its diagonal by the variance of each gradient, which draws w away
    from noisy tasks. (Given such a product, which need not be symmetric, the method is the paper's.) As in the authors'
    code it is divided by the square of the mean norm, so that lr does not depend on the scale of the gradients, but
    without their summand against 0, which small gradients would feel. And lr counts as 1 over the norm of that matrix
    where it is larger, unless ``scale="paper"``: there the iterates leap between corners of the simplex instead of
    settling. A Gramian has at least the norm 1, so it always does at the usual lr.

    Args:
        lr: Learning rate of the weights, above 0.
        momentum: Its momentum, in [0, 1).
        n_iter: Steps at each call, at least 1.
        lambda_: Pull towards the mean, at least 0.
        scale: Equal rows give that row in both; ``"paper"`` takes lr as it is.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        scale: Scale = "mean",
    ) -> None:
        if not 0 < lr < math.inf:
            raise ValueError(f"lr: must be above 0 and finite, found {lr}; 10 is usual")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: must be in [0, 1), found {momentum}; 0.5 is usual")
        if n_iter < 1:
            raise ValueError(f"n_iter: must be at least 1, found {n_iter}; 20 is usual")
        if not 0 <= lambda_ < math.inf:
            raise ValueError(f"lambda_: must be at least 0 and finite, found {lambda_}; 0.3 is usual")
        check_scale(scale)
        self._lr = lr
        self._momentum = momentum
        self._n_iter = n_iter
        self._lambda = lambda_
        self._scale = scale
        self._weights = TaskCoefficients()
        # Of many orthogonal rows of one length, one that doubles has its part go from (1 + lambda) / M to
        # max((1 + lambda) / 2, 2 lambda) / M.
        self.weights_act = "reversed" if lambda_ < 1 else "partly"

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        tasks = range(len(gramian_MM)) if tasks is None else tasks
        inner_MM = gramian_MM.detach().to("cpu", torch.float64).numpy()
        num_rows = len(inner_MM)
        before_M = self._weights.of(tasks).nan_to_num(1 / num_rows).numpy()
        weights_M = self._descend(inner_MM, onto_simplex(before_M))
        self._weights.keep(tasks, torch.from_numpy(weights_M))
        return torch.from_numpy((weights_M + self._lambda / num_rows) / (1 + self._lambda))

    def _descend(self, inner_MM: NDArray[np.float64], weights_M: NDArray[np.float64]) -> NDArray[np.float64]:
        mean_norm = np.sqrt(np.maximum(inner_MM.diagonal(), 0.0)).mean()
        if mean_norm == 0:
            return weights_M
        normal_MM = inner_MM / mean_norm / mean_norm
        settling = math.inf if self._scale == "paper" else 1 / float(np.linalg.norm(normal_MM, 2))
        velocity_M = np.zeros_like(weights_M)
        for _ in range(self._n_iter):
            velocity_M = self._momentum * velocity_M + normal_MM @ (weights_M + self._lambda / len(weights_M))
            weights_M = onto_simplex(weights_M - min(self._lr, settling) * velocity_M)
        return weights_M

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights.load_state_dict(state["weights"])
