"""Greedy answers, batched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

from mtl.evaluation.batches import Ranks, batches_within, in_step, pad_left

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
    prompts: Sequence[Sequence[int]],
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
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stops) or None,
        pad_token_id=min(stops, default=0),
        use_cache=True,
    )
    answers: list[list[int]] = [[] for _ in prompts]
    with _without_own_settings(model):
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        for batch in in_step(batches_within(lengths, token_budget), ranks):
            prompt_BP, mask_BP = pad_left([prompts[i] for i in batch], model.device)
            generated = model.generate(  # type: ignore[operator]
                input_ids=prompt_BP,
                attention_mask=mask_BP,
                generation_config=greedy,
                # Goes on until the slowest rank has its answers. transformers' own guess if not sharded.
                synced_gpus=True if ranks is not None and ranks.sharded else None,
            )
            for i, tokens in zip(batch, generated[:, prompt_BP.shape[1] :].tolist(), strict=True):
                answers[i] = list(takewhile(lambda token: token not in stops, tokens))
            on_batch(len(batch))
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
