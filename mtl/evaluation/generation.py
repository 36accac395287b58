"""Greedy answers, batched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtl.evaluation.batches import Ranks, pad_left
from mtl.evaluation.prompts import Prompts, Reading, Tokens, read_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mtl.data.tokenized import TokenizedExample


def stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[TokenizedExample]
) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's and the model's end of sequence, and the examples' end of turn.

    The last target of an example is its end of turn unless the example was cut off; an ordinary word is never one.
    """
    configured = model.generation_config.eos_token_id
    stops = set(configured) if isinstance(configured, list) else {configured}
    stops.add(tokenizer.eos_token_id)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    last_targets = (int(example.input_ids[example.is_target][-1]) for example in examples)
    return frozenset(stops - {None}) | {token for token in last_targets if token in special}


def generate_answers(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stops: Collection[int],
    token_budget: int,
    on_batch: Callable[[int], None],
    ranks: Ranks | None = None,
) -> list[list[int]]:
    """The most likely next token again and again, until a stop token or ``max_new_tokens``.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids of each prompt.
        max_new_tokens: Length limit of an answer [tokens].
        stops: Tokens that end an answer.
        token_budget: Positions of a batch, padding and answers included.
        on_batch: Told the number of prompts done after each batch.
        ranks: The run's ranks, if each has prompts of its own; with sharded parameters, at least one.

    Returns:
        Token ids of each answer, without the stop token.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    answer_lengths = [max_new_tokens] * len(prompts)
    for batch, read in read_batches(
        model, prompts, answer_lengths=answer_lengths, token_budget=token_budget, ranks=ranks
    ):
        found = greedy_answers(read, max_new_tokens=max_new_tokens, stops=stops, ranks=ranks)
        for i, answer in zip(batch, found, strict=True):
            answers[i] = answer
        on_batch(len(batch))
    return answers


def greedy_answers(
    prompts: Prompts, *, max_new_tokens: int, stops: Collection[int], ranks: Ranks | None = None
) -> list[list[int]]:
    """The same of one batch, which is used up by it."""
    if prompts.read is None:
        answers = _generated(prompts, max_new_tokens=max_new_tokens, stops=stops, ranks=ranks)
    else:
        answers = _going_on(*prompts.read, max_new_tokens=max_new_tokens, stops=stops, ranks=ranks)
    return [list(takewhile(lambda token: token not in stops, answer)) for answer in answers]


def _going_on(
    reading: Reading, logits_RV: Tensor, *, max_new_tokens: int, stops: Collection[int], ranks: Ranks | None
) -> list[list[int]]:
    """Answers through their stop tokens, and perhaps something behind."""
    answers: list[list[int]] = [[] for _ in logits_RV]
    rows = list(range(len(answers)))  # whose answer each row is
    for num_tokens in range(1, max_new_tokens + 1):
        tokens = logits_RV.argmax(-1).tolist()
        for i, token in zip(rows, tokens, strict=True):
            answers[i].append(token)
        open_rows = [row for row, i in enumerate(rows) if not any(token in stops for token in answers[i])]
        if num_tokens == max_new_tokens or not _any_rank(bool(open_rows), ranks):
            break
        # Rows that have stopped leave several at once, since those that stay are copied. One stays in any case, until
        # the slowest rank has its answers.
        if 4 * len(open_rows) <= 3 * len(rows) and len(rows) > 1:
            kept = open_rows or [0]
            reading = reading.rows(torch.tensor(kept, device=logits_RV.device))
            rows, tokens = [rows[row] for row in kept], [tokens[row] for row in kept]
        logits_RV = reading.read([[token] for token in tokens], [1] * len(tokens))
    return answers


def _any_rank(value: bool, ranks: Ranks | None) -> bool:
    return any(ranks.gather(value)) if ranks is not None and ranks.sharded else value


def _generated(
    prompts: Prompts, *, max_new_tokens: int, stops: Collection[int], ranks: Ranks | None
) -> list[list[int]]:
    """Answers by transformers' own loop, which knows every kind of cache."""
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stops) or None,
        pad_token_id=min(stops, default=0),
        use_cache=True,
    )
    prompt_BP, mask_BP = pad_left(prompts.tokens, prompts.model.device)
    with _without_own_settings(prompts.model):
        generated = prompts.model.generate(  # type: ignore[operator]
            input_ids=prompt_BP,
            attention_mask=mask_BP,
            generation_config=greedy,
            # Goes on until the slowest rank has its answers. transformers' own guess if not sharded.
            synced_gpus=True if ranks is not None and ranks.sharded else None,
        )
    answers: list[list[int]] = generated[:, prompt_BP.shape[1] :].tolist()
    return answers


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Hides the model's generation settings, which ``generate`` would merge into ours.

    A repetition penalty from there would make the search something else than greedy, a temperature would warn.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
