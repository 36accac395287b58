"""Gradients made orthogonal and equally long. Shape suffix: M present tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.scale import Scale, check_scale


class AlignedMTL(GramianSurgery):
    """The mean of the orthogonal rows nearest to J, all as long as its least singular value says.

    ``w = sigma V L^(-1/2) V^T u`` over the eigenpairs (L, V) of G that are not 0, u the mean; ``sigma^2`` is the least
    eigenvalue, their median or their mean. The result may still conflict with a task, and nearly equal gradients make
    the least singular value, and with it the step, small.

    Source: Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, Eq. 11 to 14.

    Args:
        scale_mode: ``"min"`` (the paper's), ``"median"`` or ``"rmse"``.
        rank_tolerance: Eigenvalues below this share of the largest, times M, count as 0.
        scale: ``"mean"`` and ``"paper"`` are the same here, with the mean as the preference: equal rows give that row.

    Raises:
        ValueError: If an argument is outside its range.
    """

    weights_act = "partly"

    def __init__(
        self,
        scale_mode: Literal["min", "median", "rmse"] = "min",
        rank_tolerance: float = 1e-14,
        scale: Scale = "mean",
    ) -> None:
        if scale_mode not in ("min", "median", "rmse"):
            raise ValueError(f'scale_mode: must be "min", "median" or "rmse", found {scale_mode!r}; choose one of them')
        if not 0 < rank_tolerance < 1:
            raise ValueError(f"rank_tolerance: must be between 0 and 1, found {rank_tolerance}; 1e-14 is usual")
        check_scale(scale)
        self._scale_mode = scale_mode
        self._rank_tolerance = rank_tolerance

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        inner_MM = gramian_MM.detach().to("cpu", torch.float64).numpy()
        unit = float(inner_MM.diagonal().max(initial=0.0)) or 1.0  # squares of norms may leave the range of numbers
        values_M, vectors_MM = np.linalg.eigh(inner_MM / unit)
        kept = values_M > self._rank_tolerance * len(values_M) * values_M.max(initial=0.0)
        if not kept.any():
            return torch.zeros(len(inner_MM), dtype=torch.float64)
        values, vectors = values_M[kept], vectors_MM[:, kept]
        # They ascend; of two in the middle the authors' code takes the lower one.
        median = values[(len(values) - 1) // 2]
        square = {"min": values[0], "median": median, "rmse": values.mean()}[self._scale_mode]
        return torch.from_numpy(
            vectors @ (vectors.mean(axis=0) * len(vectors) / len(inner_MM) * np.sqrt(square / values))
        )
