"""Surgery by one sign an element. Shape suffixes: M present tasks, N shared trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.surgery.scale import Scale, check_scale


class GradDrop:
    """Keeps in every element only the gradients of one sign, drawn by how pure the sign is there.

    With p and n the sums of an element's positive and of its negative parts, the purity is
    ``P = (1 + (p + n) / (p - n)) / 2 = p / (p - n)``, and the result is p with probability P and n otherwise: the rows'
    sum in expectation, so loss weights act in full. A leak ``l_t`` lets that share of row t through in any case: it is
    ``sum_t l_t g_t`` plus the draw from the parts times ``1 - l_t``.

    Source: Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020,
    Algorithm 1 with f the identity; there on the gradients of a layer's activations, here on those of the parameters.

    Args:
        leak: Share, in [0, 1], of each row that no draw holds back: one for all tasks, or a mapping from task name (0
            for tasks it does not name).
        names: Names of the tasks; needed to read a mapping.
        seed: Seed of the draws, which come from a generator of its own, on the CPU.
        scale: ``"mean"`` divides the paper's sum by M, so that equal rows give that row; ``"paper"`` leaves the sum.

    Raises:
        ValueError: If a leak is outside its range or of an unknown task, or the scale is another word.
    """

    weights_act = "yes"

    def __init__(
        self,
        leak: float | Mapping[str, float] = 0.0,
        names: Sequence[str] | None = None,
        seed: int = 0,
        scale: Scale = "mean",
    ) -> None:
        check_scale(scale)
        self._leak = leak_of_each_task(leak, names)
        self._scale = scale
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, grads_MN: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        """Returns the combined gradient [N]; draws N numbers."""
        tasks = range(len(grads_MN)) if tasks is None else tasks
        positive_N, negative_N, leaked_N = (torch.zeros_like(grads_MN[0]) for _ in range(3))
        held_positive_N, held_negative_N = torch.zeros_like(positive_N), torch.zeros_like(negative_N)
        for row_N, task in zip(grads_MN, tasks, strict=True):  # row by row, to hold no second matrix
            leak = self._leak if isinstance(self._leak, float) else self._leak[task]
            above_N, below_N = row_N.clamp(min=0), row_N.clamp(max=0)
            positive_N += above_N
            negative_N += below_N
            held_positive_N += (1 - leak) * above_N
            held_negative_N += (1 - leak) * below_N
            leaked_N += leak * row_N
        drawn_N = torch.rand(len(positive_N), generator=self._generator).to(grads_MN.device)
        # Draws are below 1, so a pure sign is always kept. Where all rows are 0 the purity is NaN, and either sum is 0.
        chosen_N = torch.where(positive_N / (positive_N - negative_N) > drawn_N, held_positive_N, held_negative_N)
        combined_N = leaked_N + chosen_N
        return combined_N / len(grads_MN) if self._scale == "mean" else combined_N

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])


def leak_of_each_task(leak: float | Mapping[str, float], names: Sequence[str] | None) -> float | list[float]:
    """One leak for all tasks, or one for each in order; checked."""
    leaks: float | list[float]
    if isinstance(leak, Mapping):
        if names is None:
            raise ValueError("names: must be given to read leaks by task name, found None; pass the tasks' names")
        unknown = [name for name in leak if name not in names]
        if unknown:
            raise ValueError(f"leak: must name tasks of the run, found {unknown[0]!r}; the tasks are {list(names)}")
        leaks = [float(leak.get(name, 0.0)) for name in names]
    else:
        leaks = float(leak)
    for share in leaks if isinstance(leaks, list) else [leaks]:
        if not 0 <= share <= 1:
            raise ValueError(f"leak: must be a share in [0, 1], found {share}; 0 is the paper's, 1 is no surgery")
    return leaks
