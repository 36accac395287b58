"""Choosing among given answers by their likelihood.

Shape suffixes: B prompts, R options of all prompts together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mtl.data.tokenized import TokenizedExample
from mtl.evaluation.batches import Ranks
from mtl.evaluation.losses import summed_losses
from mtl.evaluation.prompts import Prompts, Reading, Tokens, groups_of, read_batches
from mtl.models.forward import full_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def option_log_likelihoods(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    options: Sequence[Sequence[Tokens]],
    *,
    token_budget: int,
    on_batch: Callable[[int], None],
    ranks: Ranks | None = None,
) -> list[list[float]]:
    """``log p(option | prompt)`` of every option, summed over its tokens through the end of turn [nats].

    The sum is the probability that the model gives exactly this answer and then stops, so the largest one is the
    answer that it would most often give. A mean per token is no probability of an answer, and favours long options
    whose last tokens follow from their first.

    A prompt is read once; its options go on from there.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids of each prompt.
        options: Token ids of each prompt's options, each with its end-of-turn token.
        token_budget: Positions of a batch over all options, padding included.
        on_batch: Told the number of prompts done after each batch.
        ranks: The run's ranks, if each has prompts of its own; with sharded parameters, at least one.
    """
    likelihoods: list[list[float]] = [[] for _ in prompts]
    for batch, read in read_batches(
        model,
        prompts,
        answer_lengths=[max(map(len, choices)) for choices in options],
        rows=[len(choices) for choices in options],
        token_budget=token_budget,
        ranks=ranks,
    ):
        found = log_likelihoods(read, [options[i] for i in batch], ranks=ranks)
        for i, values in zip(batch, found, strict=True):
            likelihoods[i] = values
        on_batch(len(batch))
    return likelihoods


def log_likelihoods(
    prompts: Prompts, options: Sequence[Sequence[Tokens]], *, ranks: Ranks | None = None
) -> list[list[float]]:
    """The same of one batch; the prompts stay as they are, for something else to go on from."""
    owners = [i for i, choices in enumerate(options) for _ in choices]
    rows = [option for choices in options for option in choices]
    if prompts.read is None:
        pairs = [(prompts.tokens[i], row) for i, row in zip(owners, rows, strict=True)]
        flat = iter(_from_the_start(prompts.model, pairs))
    else:
        flat = iter(_going_on(*prompts.read, owners, rows, ranks).tolist())
    return [list(islice(flat, len(choices))) for choices in options]


def _going_on(
    reading: Reading, logits_BV: Tensor, owners: Sequence[int], rows: Sequence[Tokens], ranks: Ranks | None
) -> Tensor:
    """Log-likelihoods [R] in float64 on the CPU."""
    owner_R = torch.tensor(owners, device=logits_BV.device)
    losses_R = _token_losses(logits_BV[owner_R], [row[0] for row in rows])
    # The last token is only ever predicted, so single ones need no second forward, unless another rank's do.
    in_step = ranks is not None and ranks.sharded
    longer = [r for r, row in enumerate(rows) if len(row) > 1 or in_step]
    inputs = [rows[r][:-1] or rows[r] for r in longer]
    for group in groups_of(inputs, ranks):
        chosen = [longer[i] for i in group]
        targets = [rows[r][1:] for r in chosen]
        logits_KV = reading.rows(owner_R[chosen]).read([inputs[i] for i in group], [len(t) for t in targets])
        row_K = torch.tensor([r for r, t in zip(chosen, targets, strict=True) for _ in t], dtype=torch.long)
        losses_R.index_add_(0, row_K, _token_losses(logits_KV, [token for t in targets for token in t]))
    return -losses_R


def _token_losses(logits_KV: Tensor, tokens: Sequence[int]) -> Tensor:
    target_K = torch.tensor(tokens, dtype=torch.long, device=logits_KV.device)
    return F.cross_entropy(full_precision(logits_KV), target_K, reduction="none").cpu().double()


def _from_the_start(model: PreTrainedModel, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[float]:
    """Log-likelihoods from whole sequences, in one forward: exact whatever a model keeps of what it has read."""
    examples = [
        TokenizedExample(
            np.array([*prompt, *option], dtype=np.int32), np.arange(len(prompt) + len(option)) >= len(prompt)
        )
        for prompt, option in pairs
    ]
    token_budget = len(examples) * max(len(example.input_ids) for example in examples)
    losses = summed_losses(model, examples, token_budget=token_budget, on_batch=lambda num_examples: None)
    return [-loss for loss in losses]
