"""Prompts that a model has read: what options are scored from, and answers go on from.

Shape suffixes: B prompts, R rows, P positions read, C positions to read, K positions to predict from, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mtl.evaluation.batches import Ranks, batches_within, in_step, of_similar_length

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Tokens = Sequence[int]


class Reading:
    """What a model keeps of rows that it has read (keys and values), and goes on from.

    Args:
        model: A causal language model of which :func:`cache_may_hold_padding` is true.
        cache: Its cache.
        is_real_RP: Which of the cached positions hold tokens; the others hold padding.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, is_real_RP: Tensor) -> None:
        self.model = model
        self.cache = cache
        self.is_real_RP = is_real_RP

    def rows(self, index_R: Tensor) -> Reading:
        """These rows, as often as they are named, to go on from in another way."""
        cache = copy(self.cache)
        cache.layers = [copy(layer) for layer in cache.layers]
        cache.reorder_cache(index_R)  # type: ignore[arg-type] # selects, so no tensor is shared
        return Reading(self.model, cache, self.is_real_RP[index_R])

    @classmethod
    def together(cls, readings: Sequence[Reading], index_R: Tensor) -> Reading:
        """The rows of all readings in one, in the order of ``index_R``; the shorter ones get padding."""
        cache = copy(readings[0].cache)
        length = max(reading.is_real_RP.shape[1] for reading in readings)
        cache.layers = [_together(layers, length) for layers in zip(*(r.cache.layers for r in readings), strict=True)]
        cache.reorder_cache(index_R)  # type: ignore[arg-type]
        masks = [F.pad(r.is_real_RP, (0, length - r.is_real_RP.shape[1])) for r in readings]
        return cls(readings[0].model, cache, torch.cat(masks)[index_R])

    def read(self, rows: Sequence[Tokens], num_predicting: Sequence[int]) -> Tensor:
        """Reads on in every row.

        Args:
            rows: The next token ids of each row, at least one.
            num_predicting: After how many of them, the last ones, the next token is asked for.

        Returns:
            Logits [K, V] of these next tokens, row by row.
        """
        device = self.is_real_RP.device
        length = max(map(len, rows))
        input_RC = torch.tensor([[*row] + [0] * (length - len(row)) for row in rows], device=device)
        place_C = torch.arange(length, device=device)
        end_R1 = torch.tensor([[len(row)] for row in rows], device=device)
        begin_R1 = end_R1 - torch.tensor(num_predicting, device=device)[:, None]
        logits: Tensor = self.model(
            input_ids=input_RC,
            # Nothing before the end of a row looks at the padding behind it.
            attention_mask=torch.cat([self.is_real_RP, torch.ones_like(input_RC)], dim=1),
            position_ids=self.is_real_RP.sum(1, keepdim=True) + place_C,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=(begin_R1 <= place_C) & (place_C < end_R1),
        ).logits
        self.is_real_RP = torch.cat([self.is_real_RP, (place_C < end_R1).long()], dim=1)
        return logits.view(-1, logits.shape[-1])


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Args:
        model: The model.
        tokens: Token ids of each prompt.
        read: What the model keeps of them, and the logits [B, V] of the token after each; ``None`` for a model whose
            cache allows no padding within a row.
    """

    model: PreTrainedModel
    tokens: Sequence[Tokens]
    read: tuple[Reading, Tensor] | None


def cache_may_hold_padding(model: PreTrainedModel, length: int) -> bool:
    """Whether it does not matter where in the cache a token lies, only which position it was given.

    Then rows of different length may share a beginning and go on from padding. It does matter to recurrent layers, to
    sliding windows shorter than ``length``, and to models that count positions themselves (MPT's ALiBi).
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return "position_ids" in inspect.signature(type(model).forward).parameters and all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and length < layer.sliding_window)
        for layer in DynamicCache(config=model.config).layers
    )


def read_batches(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    *,
    answer_lengths: Sequence[int],
    rows: Sequence[int] | None = None,
    token_budget: int,
    ranks: Ranks | None,
) -> Iterator[tuple[list[int], Prompts]]:
    """Reads prompts in batches, each prompt once, and what all of them begin with once for all batches.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids of each prompt.
        answer_lengths: Positions that what follows each prompt takes.
        rows: How many answers follow each prompt; one if not given.
        token_budget: Positions of a batch over all answers, prompts and padding included.
        ranks: The run's ranks, if each has prompts of its own; with sharded parameters, at least one.

    Yields:
        Indices of a batch's prompts, and the batch.
    """
    lengths = [len(prompt) + length for prompt, length in zip(prompts, answer_lengths, strict=True)]
    batches = in_step(batches_within(lengths, token_budget, rows), ranks)
    longest = max(map(len, prompts), default=0) + max(answer_lengths, default=0)
    num_shared = _num_shared(prompts)
    if ranks is not None and ranks.sharded:
        longest, num_shared = max(ranks.gather(longest)), min(ranks.gather(num_shared))
    if not cache_may_hold_padding(model, longest):
        for batch in batches:
            yield batch, Prompts(model, [prompts[i] for i in batch], None)
        return

    beginning = _nothing_read(model)
    if num_shared:
        beginning.read([prompts[0][:num_shared]], [0])
    for batch in batches:
        rests = [prompts[i][num_shared:] for i in batch]
        yield batch, Prompts(model, [prompts[i] for i in batch], _read(beginning, rests, groups_of(rests, ranks)))


def groups_of(rows: Sequence[Tokens], ranks: Ranks | None) -> list[list[int]]:
    """Rows to read in one forward each; all in a single one where every forward is a collective."""
    if ranks is not None and ranks.sharded:
        return [list(range(len(rows)))]
    return list(of_similar_length([len(row) for row in rows]))


def _read(beginning: Reading, rests: Sequence[Tokens], groups: Sequence[Sequence[int]]) -> tuple[Reading, Tensor]:
    """Reads on from the one row of ``beginning`` with all of the rests."""
    device = beginning.is_real_RP.device
    readings, logits = [], []
    for group in groups:
        reading = beginning.rows(torch.zeros(len(group), dtype=torch.long, device=device))
        rows = [rests[i] for i in group]
        logits.append(reading.read(rows, [1] * len(rows)))
        readings.append(reading)
    # Where in the groups each row is.
    index_B = torch.tensor([i for group in groups for i in group], device=device).argsort()
    return Reading.together(readings, index_B), torch.cat(logits)[index_B]


def _num_shared(prompts: Sequence[Tokens]) -> int:
    """How many tokens all prompts begin with; each keeps a last one of its own, to predict the next from."""
    if len(prompts) < 2:
        return 0
    ends = min(prompts, key=tuple), max(prompts, key=tuple)  # whatever these two share, all that lie between them do
    num_equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
    return min(num_equal, *(len(prompt) - 1 for prompt in prompts))


def _together(layers: Sequence[Any], length: int) -> Any:  # noqa: ANN401 - transformers' layers have no common type
    joined = copy(layers[0])
    for name in ("keys", "values"):
        tensors = [getattr(layer, name) for layer in layers]
        setattr(joined, name, torch.cat([F.pad(tensor, (0, 0, 0, length - tensor.shape[2])) for tensor in tensors]))
    if joined.is_sliding:
        joined.cumulative_length = length
    return joined


def _nothing_read(model: PreTrainedModel) -> Reading:
    from transformers import DynamicCache

    return Reading(model, DynamicCache(config=model.config), torch.ones(1, 0, dtype=torch.long, device=model.device))
