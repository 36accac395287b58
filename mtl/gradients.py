"""Losses and gradients of a step, with the tasks apart or already mixed.

Each example belongs to one task, so the T rows of J cost the FLOPs of one mixed backward: one forward and backward for
each task's own examples, never T backwards through one graph. Shape suffixes are those of :mod:`mtl.interfaces`; R is
the number of rows: M with the tasks apart, 1 with them mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mtl.data.batching import Batch, MicroBatch
from mtl.distributed import Distributed
from mtl.errors import UserError
from mtl.interfaces import AdapterLayout
from mtl.models.forward import target_nll


@dataclass
class TaskGradients:
    """What a backward pass leaves behind, summed over micro-batches and ranks.

    Args:
        tasks: The M present tasks, ascending.
        losses_M: Mean NLL over all target tokens of each task [nats], float64 on the CPU.
        shared_RN: Gradients with respect to the shared parameters: rows ``g_t`` if apart, else that of the objective.
        private: Flat gradient of each present task's private parameters, in the order of ``tasks``.
    """

    tasks: list[int]
    losses_M: Tensor
    shared_RN: Tensor
    private: list[Tensor]


class Backward:
    """Runs the forward and backward passes of a step.

    Args:
        model: The causal LM that ``layout`` has put its parameters on.
        layout: Tells shared from private parameters and switches adapters.
        distributed: Sums over ranks.
        max_tokens: Positions of a micro-batch; changes speed and memory, never the numbers.
        packing: Whether a row may hold several examples.
        seed: Of the dropout masks, together with step, rank and micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: AdapterLayout,
        distributed: Distributed,
        *,
        max_tokens: int,
        packing: bool,
        seed: int,
    ) -> None:
        self.model = model
        self.layout = layout
        self.distributed = distributed
        self.max_tokens = max_tokens
        self.packing = packing
        self.seed = seed
        self._buffer = torch.empty(0)
        dtypes = {parameter.dtype for parameter in layout.parameters()}
        if len(dtypes) > 1:
            raise UserError(f"The trainable parameters have several dtypes, {dtypes}; set model.dtype to one of them.")
        (self.dtype,) = dtypes

    @property
    def num_shared(self) -> int:
        """N."""
        return sum(parameter.numel() for parameter in self.layout.shared_parameters())

    def __call__(self, batch: Batch, scale_T: Tensor, *, step: int, apart: bool) -> TaskGradients:
        """Gradients of ``scale_t L_t``: one row a present task if ``apart``, else one row of their sum.

        Private gradients are scaled alike. ``.grad`` of all parameters is ``None`` afterwards.
        """
        tasks = [int(task) for task in np.flatnonzero(batch.counts_T)]
        num_targets_T = torch.from_numpy(batch.num_targets_T).double()
        per_target_T = (scale_T.double() / num_targets_T.clamp(min=1)).to(self.distributed.device)
        shared_RN, private = self._buffers(tasks, num_rows=len(tasks) if apart else 1)
        nll_T = torch.zeros(batch.num_tasks, dtype=torch.float64, device=self.distributed.device)
        for micro_batch in self._micro_batches(batch, step, mix_tasks=not (apart or self._has_private(tasks))):
            task = micro_batch.tasks[0]
            row = shared_RN[tasks.index(task) if apart else 0]
            attach(self.layout.shared_parameters(), row)
            if self._has_private([task]):
                attach(self.layout.private_parameters(task), private[tasks.index(task)])
            with self.layout.activate(task):
                nll = target_nll(self.model, micro_batch)
                # Sums over target tokens with the step's own denominators: a mean of micro-batch means would weigh
                # a token by how few others share its micro-batch.
                (nll * per_target_T[micro_batch.label_tasks].to(nll.dtype)).sum().backward()
            nll_T.index_add_(0, micro_batch.label_tasks, nll.detach().double())
        for parameter in self.layout.parameters():
            parameter.grad = None
        self.distributed.sum_(nll_T)
        self.distributed.sum_(self._buffer)
        losses_T = nll_T.cpu() / num_targets_T.clamp(min=1)
        return TaskGradients(tasks, losses_T[tasks], shared_RN, private)

    def _micro_batches(self, batch: Batch, step: int, *, mix_tasks: bool) -> Iterator[MicroBatch]:
        rank = self.distributed.rank
        mine = batch.slice(rank, self.distributed.world_size)
        cut = mine.micro_batches(self.max_tokens, packing=self.packing, mix_tasks=mix_tasks)
        for index, micro_batch in enumerate(cut):
            # Seeding every micro-batch makes dropout a function of this tuple, so no generator state is ever saved.
            entropy = np.random.SeedSequence([self.seed, step, rank, index])
            torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            yield micro_batch.to(self.distributed.device)

    def _buffers(self, tasks: Sequence[int], num_rows: int) -> tuple[Tensor, list[Tensor]]:
        """Zeroed [R, N] rows and flat private gradients, all in one buffer, so that one all-reduce sums them."""
        sizes = [sum(parameter.numel() for parameter in self.layout.private_parameters(task)) for task in tasks]
        num_shared = self.num_shared
        needed = num_rows * num_shared + sum(sizes)
        if self._buffer.numel() != needed:
            self._buffer = torch.empty(needed, dtype=self.dtype, device=self.distributed.device)
        self._buffer.zero_()
        shared, *private = self._buffer.split([num_rows * num_shared, *sizes])
        return shared.view(num_rows, num_shared), private

    def _has_private(self, tasks: Sequence[int]) -> bool:
        return any(self.layout.private_parameters(task) for task in tasks)


def attach(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Points every ``.grad`` into ``flat``, where a backward then accumulates without a copy."""
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)
