"""Choosing among given answers by their likelihood.

Shape suffixes: B prompts, R options of all prompts together, P prompt positions, C continuation positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mtl.evaluation.batches import Ranks, batches_within, in_step, pad_left
from mtl.models.forward import full_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = Sequence[int]


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

    A prompt is encoded once; its options go on from copies of its cache.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids of each prompt.
        options: Token ids of each prompt's options, each with its end-of-turn token.
        token_budget: Positions of a batch over all options, padding included.
        on_batch: Told the number of prompts done after each batch.
        ranks: The run's ranks, if each has prompts of its own; with sharded parameters, at least one.
    """
    lengths = [len(prompt) + max(map(len, choices)) for prompt, choices in zip(prompts, options, strict=True)]
    likelihoods: list[list[float]] = [[] for _ in prompts]
    # Single tokens need no second forward, unless another rank's do.
    in_two = ranks is not None and ranks.sharded
    if ranks is not None and in_two:
        in_two = max(ranks.gather(max((len(option) for choices in options for option in choices), default=1))) > 1
    batches = batches_within(lengths, token_budget, rows=[len(choices) for choices in options])
    for batch in in_step(batches, ranks):
        chosen = [options[i] for i in batch]
        flat = _batch_log_likelihoods(model, [prompts[i] for i in batch], chosen, in_two=in_two).tolist()
        for i in batch:
            likelihoods[i], flat = flat[: len(options[i])], flat[len(options[i]) :]
        on_batch(len(batch))
    return likelihoods


def _batch_log_likelihoods(
    model: PreTrainedModel, prompts: Sequence[Tokens], options: Sequence[Sequence[Tokens]], *, in_two: bool
) -> Tensor:
    """Log-likelihoods [R] in float64 on the CPU, prompt by prompt; two forwards even of single tokens if ``in_two``."""
    prompt_BP, mask_BP = pad_left(prompts, model.device)
    encoded = model(
        input_ids=prompt_BP,
        attention_mask=mask_BP,
        position_ids=(mask_BP.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    owner_R = torch.tensor([i for i, choices in enumerate(options) for _ in choices], device=model.device)
    rows = [option for choices in options for option in choices]
    first_R = torch.tensor([row[0] for row in rows], device=model.device)
    losses_R = F.cross_entropy(full_precision(encoded.logits[owner_R, -1]), first_R, reduction="none").cpu().double()
    if max(map(len, rows)) == 1 and not in_two:
        return -losses_R

    # The last token is only ever predicted, so a continuation is one token shorter than its option.
    continuation_RC, label_RC, keep_RC = _continuations(rows, model.device)
    cache = encoded.past_key_values
    cache.batch_select_indices(owner_R)
    logits = model(
        input_ids=continuation_RC,
        attention_mask=torch.cat([mask_BP[owner_R], torch.ones_like(continuation_RC)], dim=1),
        position_ids=mask_BP.sum(1)[owner_R, None] + torch.arange(continuation_RC.shape[1], device=model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep_RC,
    ).logits
    token_losses = F.cross_entropy(full_precision(logits), label_RC[keep_RC], reduction="none").cpu().double()
    return -losses_R.index_add(0, keep_RC.nonzero()[:, 0].cpu(), token_losses)


def _continuations(rows: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, their next tokens, and where both are real, each [R, C]; padded on the right."""
    length = max(1, max(map(len, rows)) - 1)
    padded = torch.tensor([list(row) + [0] * (length + 1 - len(row)) for row in rows], device=device)
    num_inputs_R = torch.tensor([len(row) - 1 for row in rows], device=device)
    return padded[:, :-1], padded[:, 1:], torch.arange(length, device=device) < num_inputs_R[:, None]
