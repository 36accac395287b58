"""Sampling as evenly as the number of repetitions allows. Shape suffix: T tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtl.samplers.draws import FixedMixture, checked_sizes


class UniMax(FixedMixture):
    """As equal as possible without repeating any task's data more than ``max_epochs`` times.

    From the smallest task to the largest, each gets ``U_t = min(budget left / tasks left, max_epochs n_t)``, and
    ``p_t = U_t / sum U``. Tasks that the cap does not bind are sampled alike; a budget beyond ``max_epochs sum n``
    gives proportional sampling.

    Source: Chung et al., "UniMax: Fairer and More Effective Language Sampling for Large-Scale Multilingual
    Pretraining", ICLR 2023, Algorithm 1.

    Args:
        sizes: Size ``n_t`` of each task [T], in any unit (examples, tokens), as much as is left after filtering.
        budget: What the stage will see altogether, in the unit of the sizes; ``None`` for ``num_steps * batch_size``,
            right for sizes in examples.
        max_epochs: The paper's N, above 0: how often a task's data may be repeated. The paper compares 1, 5 and 10.
        num_steps: Optimizer steps of the stage.
        batch_size: Examples of a step.
        seed: Orders ties between equal tasks.

    Raises:
        ValueError: If a size is below 1, the budget or the cap is not above 0, or there is no budget.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        budget: float | None = None,
        max_epochs: float = 4.0,
        num_steps: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if budget is None:
            if num_steps is None or batch_size is None:
                raise ValueError("budget: must be given where num_steps and batch_size are not, found None; pass it")
            budget = num_steps * batch_size
        if not 0 < budget < np.inf:
            raise ValueError(f"budget: must be above 0 and finite, found {budget}; it is in the unit of the sizes")
        if not 0 < max_epochs < np.inf:
            raise ValueError(f"max_epochs: must be above 0 and finite, found {max_epochs}; 4 allows four repetitions")
        sizes_T = checked_sizes(sizes)
        budget_T = np.zeros(len(sizes_T))
        left = float(budget)
        for rank, task in enumerate(np.argsort(sizes_T, kind="stable")):
            budget_T[task] = min(left / (len(sizes_T) - rank), max_epochs * sizes_T[task])
            left -= budget_T[task]
        super().__init__(budget_T, seed)
