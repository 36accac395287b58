"""Exact negative log-likelihoods, whatever way the examples are cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from mtl.data.batching import Batch
from mtl.evaluation.batches import Ranks, in_step
from mtl.models.forward import target_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mtl.data.tokenized import TokenizedExample


def summed_losses(
    model: PreTrainedModel,
    examples: Sequence[TokenizedExample],
    *,
    token_budget: int,
    on_batch: Callable[[int], None],
    ranks: Ranks | None = None,
) -> list[float]:
    """Each example's negative log-likelihood, summed over its target tokens in float64 [nats].

    Args:
        model: A causal language model in evaluation mode.
        examples: What to evaluate.
        token_budget: Positions of a micro-batch, padding included.
        on_batch: Told the number of examples done after each micro-batch.
        ranks: The run's ranks, if each has examples of its own; with sharded parameters, at least one.
    """
    losses = torch.zeros(len(examples), dtype=torch.float64)
    # Every example is a task of its own here, so that a label's task says which example it belongs to.
    batch = Batch(list(enumerate(examples)), num_tasks=len(examples))
    for micro_batch in in_step(batch.micro_batches(token_budget, row_tokens=0, mix_tasks=True), ranks):
        token_losses = target_nll(model, micro_batch.to(model.device))
        losses[list(micro_batch.tasks)] = 0.0  # it may be here for the second time
        losses.index_add_(0, micro_batch.label_tasks, token_losses.cpu().double())
        on_batch(len(micro_batch.tasks))
    return losses.tolist()
