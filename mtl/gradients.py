"""Losses and gradients of a step, with the tasks apart or already mixed.

Each example belongs to one task, so the M rows of J cost the FLOPs of one mixed backward, never M backwards through one
graph. A layout that routes gets mixed micro-batches and tells the tasks' rows apart in its layers; with any other, each
task's own examples have forwards and backwards of their own. Shape suffixes are those of :mod:`mtl.interfaces`; R is
the number of rows: M with the tasks apart, 1 with them mixed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.data.batching import MASKED_ROW_TOKENS, Batch, MicroBatch, idle
from mtl.distributed import Distributed, as_shard, is_shard, local
from mtl.errors import UserError
from mtl.interfaces import AdapterLayout, RoutingLayout
from mtl.models.attention import knows_lengths
from mtl.models.forward import evaluation_mode, probe_examples, target_logits, target_nll
from mtl.surgery import gramian


@dataclass(frozen=True)
class Anchor:
    """What keeps the model near an earlier one: ``weight`` times KL(earlier || model) at the target tokens.

    Args:
        weight: Of the divergence, beside the loss [nats per target token].
        parameters: The trainable parameters and their earlier values.
    """

    weight: float
    parameters: Sequence[tuple[nn.Parameter, Tensor]]

    @torch.no_grad()
    def log_probabilities(self, model: nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Of the earlier model [targets, V], without dropout; it leaves everything as it was."""
        now = [parameter.data for parameter, _ in self.parameters]
        try:
            for parameter, earlier in self.parameters:
                parameter.data = earlier
            with evaluation_mode(model):
                return F.log_softmax(target_logits(model, micro_batch), dim=-1)
        finally:
            for (parameter, _), data in zip(self.parameters, now, strict=True):
                parameter.data = data

    def penalty(self, earlier: Tensor, logits: Tensor) -> Tensor:
        """``weight`` KL(earlier || model) at each target token, from log-probabilities and logits [targets, V]."""
        now = F.log_softmax(logits, dim=-1)
        return self.weight * F.kl_div(now, earlier, log_target=True, reduction="none").sum(dim=-1)


@dataclass
class TaskGradients:
    """What a backward pass leaves behind, summed over micro-batches and ranks.

    Args:
        tasks: The M present tasks, ascending.
        losses_M: Mean NLL over all target tokens of each task [nats], float64 on the CPU.
        shared_RN: Gradients with respect to the shared parameters: rows ``g_t`` if apart, else that of the objective.
            Of sharded parameters, this rank's part of the columns.
        private: Flat gradient of each present task's private parameters, in the order of ``tasks``.
    """

    tasks: list[int]
    losses_M: Tensor
    shared_RN: Tensor
    private: list[Tensor]


class Backward:
    """Runs the forward and backward passes of a step.

    ``loss_scale`` multiplies every loss before its backward, and divides the gradients once they are summed. Powers of
    two change no bit, except where a float16 gradient would have been too small without.

    Args:
        model: The causal LM that ``layout`` has put its parameters on.
        layout: Tells shared from private parameters and switches adapters.
        distributed: Sums over ranks.
        max_tokens: Positions of a micro-batch; changes speed and memory, never the numbers.
        packing: Whether a row may hold several examples.
        seed: Of the dropout masks, together with step, rank and micro-batch.

    ``anchor`` adds a penalty to every task's gradient, and nothing to the losses that are told. ``routes`` says whether
    micro-batches may mix tasks that have rows or adapters of their own.
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
        self.row_tokens = (max_tokens if knows_lengths(model) else MASKED_ROW_TOKENS) if packing else 0
        self.seed = seed
        self.routes = isinstance(layout, RoutingLayout) and layout.can_route
        self.loss_scale = 1.0
        self.anchor: Anchor | None = None
        self._buffer = torch.empty(0)
        dtypes = {parameter.dtype for parameter in layout.parameters()}
        if len(dtypes) > 1:
            raise UserError(f"The trainable parameters have several dtypes, {dtypes}; set model.dtype to one of them.")
        (self.dtype,) = dtypes

    @property
    def num_shared(self) -> int:
        """N."""
        return sum(parameter.numel() for parameter in self.layout.shared_parameters())

    @property
    def row_bytes(self) -> int:
        """Of one row, or of the part of it that this rank holds."""
        return num_local(self.layout.shared_parameters()) * self.dtype.itemsize

    @property
    def shards_rows(self) -> bool:
        """Whether this rank holds only a part of each row: where the shared parameters are sharded."""
        return any(is_shard(parameter) for parameter in self.layout.shared_parameters())

    def gramian(self, shared_RN: Tensor) -> Tensor:
        """``J J^T`` [R, R] of such rows, float64 on the CPU, the same on every rank."""
        gramian_RR = gramian(shared_RN)
        if not self.shards_rows:
            return gramian_RR
        gramian_RR = self.distributed.sum_(gramian_RR.to(self.distributed.device)).cpu()
        return (gramian_RR + gramian_RR.T) / 2  # the ranks' terms may be added in another order below the diagonal

    def __call__(self, batch: Batch, scale_T: Tensor, *, step: int, apart: bool) -> TaskGradients:
        """Gradients of ``scale_t L_t``: one row a present task if ``apart``, else one row of their sum.

        Private gradients are scaled alike. ``.grad`` of all parameters is ``None`` afterwards.
        """
        tasks = [int(task) for task in np.flatnonzero(batch.counts_T)]
        num_targets_T = torch.from_numpy(batch.num_targets_T).double()
        per_target_T = (scale_T.double() / num_targets_T.clamp(min=1)).to(self.distributed.device)
        shared_RN, private = self._buffers(tasks, num_rows=len(tasks) if apart else 1)
        nll_T = torch.zeros(batch.num_tasks, dtype=torch.float64, device=self.distributed.device)
        rows = {task: row if apart else 0 for row, task in enumerate(tasks)}
        private_of = dict(zip(tasks, private, strict=True))
        for micro_batch in self._micro_batches(batch, step, tasks, mix_tasks=self._mixes(tasks, apart=apart)):
            with self._collecting(micro_batch, shared_RN, rows, private_of):
                nll, penalized = self._nll(micro_batch)
                # Sums over target tokens with the step's own denominators: a mean of micro-batch means would weigh
                # a token by how few others share its micro-batch.
                loss = (penalized * per_target_T[micro_batch.label_tasks].to(nll.dtype)).sum()
                self._accumulate(loss * self.loss_scale, micro_batch.tasks[0])
            nll_T.index_add_(0, micro_batch.label_tasks, nll.detach().double())
        for parameter in self.layout.parameters():
            parameter.grad = None
        self.distributed.sum_(nll_T)
        if not self.shards_rows:  # those FSDP has summed in the backward
            self.distributed.sum_(self._buffer)
        if self.loss_scale != 1.0:
            self._buffer.div_(self.loss_scale)
        losses_T = nll_T.cpu() / num_targets_T.clamp(min=1)
        return TaskGradients(tasks, losses_T[tasks], shared_RN, private)

    def _nll(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Of every target token, as it is and with what keeps the model near an earlier one."""
        if self.anchor is None:
            nll = target_nll(self.model, micro_batch)
            return nll, nll
        earlier = self.anchor.log_probabilities(self.model, micro_batch)
        logits = target_logits(self.model, micro_batch)
        nll = F.cross_entropy(logits, micro_batch.labels, reduction="none")
        return nll, nll + self.anchor.penalty(earlier, logits)

    @torch.no_grad()
    def losses(self, batch: Batch, *, step: int, apart: bool) -> Tensor:
        """``L_t`` [M] of a batch that was passed through before, with the same cut and dropout masks, as of now."""
        tasks = [int(task) for task in np.flatnonzero(batch.counts_T)]
        shared_RN, private = self._buffers(tasks, num_rows=len(tasks) if apart else 1)  # which only a backward fills
        rows = {task: row if apart else 0 for row, task in enumerate(tasks)}
        nll_T = torch.zeros(batch.num_tasks, dtype=torch.float64, device=self.distributed.device)
        for micro_batch in self._micro_batches(batch, step, tasks, mix_tasks=self._mixes(tasks, apart=apart)):
            with self._collecting(micro_batch, shared_RN, rows, dict(zip(tasks, private, strict=True))):
                nll_T.index_add_(0, micro_batch.label_tasks, target_nll(self.model, micro_batch).double())
        for parameter in self.layout.parameters():
            parameter.grad = None
        self.distributed.sum_(nll_T)
        return (nll_T.cpu() / torch.from_numpy(batch.num_targets_T).clamp(min=1))[tasks]

    def _mixes(self, tasks: Sequence[int], *, apart: bool) -> bool:
        """Whether a micro-batch may hold several tasks."""
        return self.routes or not (apart or any(map(self.layout.private_parameters, tasks)))

    @contextmanager
    def _collecting(
        self, micro_batch: MicroBatch, shared_RN: Tensor, rows: Mapping[int, int], private: Mapping[int, Tensor]
    ) -> Iterator[None]:
        """Lets the adapters of the micro-batch's tasks act, and its gradients add to the buffers."""
        if self.routes:
            assert isinstance(self.layout, RoutingLayout)
            with self.layout.route(micro_batch.segments, shared_RN, rows, private):
                yield
            return
        task = micro_batch.tasks[0]
        attach(self.layout.shared_parameters(), shared_RN[rows[task]])
        attach(self.layout.private_parameters(task), private[task])
        with self.layout.activate(task):
            yield

    def _accumulate(self, loss: Tensor, task: int) -> None:
        """Adds the gradient of ``loss`` to the buffers."""
        if self.routes or not self.distributed.hooks_gradients:
            loss.backward()
            return
        # DeepSpeed's hooks on a backward would take the gradients away, for its own reduction.
        parameters = [*self.layout.shared_parameters(), *self.layout.private_parameters(task)]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(gradient)

    def _micro_batches(self, batch: Batch, step: int, tasks: Sequence[int], *, mix_tasks: bool) -> Iterator[MicroBatch]:
        rank = self.distributed.rank
        mine = batch.slice(rank, self.distributed.world_size)
        cut = mine.micro_batches(self.max_tokens, row_tokens=self.row_tokens, mix_tasks=mix_tasks)
        for index, micro_batch in enumerate(self._in_step(cut, tasks[:1] if mix_tasks else tasks)):
            # Seeding every micro-batch makes dropout a function of this tuple, so no generator state is ever saved.
            entropy = np.random.SeedSequence([self.seed, step, rank, index])
            self.distributed.seed_dropout(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            yield micro_batch.to(self.distributed.device)

    def _in_step(self, cut: Iterable[MicroBatch], groups: Sequence[int]) -> Iterable[MicroBatch]:
        """With sharded parameters, adds idle micro-batches until every rank has as many of each group as the others.

        A group is one task, or all of them where ``groups`` is one task only. Ranks must also run the same task at the
        same time, since FSDP sums the gradients of one backward over them, into one row.
        """
        if not self.distributed.sharded:
            return cut
        alone = len(groups) == 1
        groups_of_cut: dict[int, list[MicroBatch]] = {task: [] for task in groups}
        for micro_batch in cut:
            groups_of_cut[groups[0] if alone else micro_batch.tasks[0]].append(micro_batch)
        counts = self.distributed.gather([len(group) for group in groups_of_cut.values()])
        return [
            micro_batch
            for (task, group), most in zip(groups_of_cut.items(), map(max, *counts), strict=True)
            for micro_batch in [*group, *[idle(task)] * (most - len(group))]
        ]

    def _buffers(self, tasks: Sequence[int], num_rows: int) -> tuple[Tensor, list[Tensor]]:
        """Zeroed [R, N] rows and flat private gradients, all in one buffer, so that one all-reduce sums them."""
        sizes = [num_local(self.layout.private_parameters(task)) for task in tasks]
        num_shared = num_local(self.layout.shared_parameters())
        needed = num_rows * num_shared + sum(sizes)
        if self._buffer.numel() != needed:
            self._buffer = torch.empty(needed, dtype=self.dtype, device=self.distributed.device)
        self._buffer.zero_()
        shared, *private = self._buffer.split([num_rows * num_shared, *sizes])
        return shared.view(num_rows, num_shared), private


def group_sizes(layout: AdapterLayout, granularity: str) -> list[int]:
    """Shared parameters in each module (``"module"``) or each numbered layer (``"layer"``), in their order.

    The A and B of a LoRA are one module; what is in no layer, such as embeddings, is one group by itself.
    """
    names = {id(parameter): name for name, parameter in layout.named_parameters().items()}
    sizes: list[int] = []
    last = None
    for parameter in layout.shared_parameters():
        name = names[id(parameter)]
        if granularity == "module":
            group = re.sub(r"\.lora_.*|\.[^.]+$", "", name)
        else:
            layer = re.match(r".*?\.\d+(?=\.)", name)
            group = layer[0] if layer else ""
        if sizes and group == last:
            sizes[-1] += parameter.numel()
        else:
            sizes.append(parameter.numel())
        last = group
    return sizes


def routing_is_exact(backward: Backward, num_tasks: int) -> bool:
    """Whether the gradients out of one mixed pass are those out of a pass for each of two tasks.

    They are not where a layer sees anything but all positions in order, as experts do that get some tokens only.
    """
    pairs = [(min(index, num_tasks - 1), example) for index, example in enumerate(probe_examples(backward.model))]
    batch = Batch(pairs * backward.distributed.world_size, num_tasks)  # dealt out so that every rank gets both
    ones_T = torch.ones(num_tasks, dtype=torch.float64)
    found = []
    with evaluation_mode(backward.model):
        for backward.routes in (False, True):
            gradients = backward(batch, ones_T, step=0, apart=True)
            found.append(torch.cat([gradients.shared_RN.flatten(), *gradients.private]))
    apart, mixed = found
    return bool((mixed - apart).norm() <= 5e-2 * apart.norm())  # float16 and bfloat16 round; a wrong route is all wrong


def attach(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Points every ``.grad`` into ``flat``, where a backward then accumulates without a copy.

    Of sharded parameters ``flat`` holds this rank's parts.
    """
    parts = [local(parameter) for parameter in parameters]
    for parameter, part, grad in zip(parameters, parts, flat.split([part.numel() for part in parts]), strict=True):
        parameter.grad = as_shard(grad.view_as(part), parameter)


def num_local(parameters: Sequence[nn.Parameter]) -> int:
    """Elements of parameters that this rank holds."""
    return sum(local(parameter).numel() for parameter in parameters)
