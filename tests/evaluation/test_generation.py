from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from mtl.data.tokenized import TokenizedExample
from mtl.evaluation.batches import batches_within, evaluating, pad_left
from mtl.evaluation.generation import generate_answers, stop_tokens


def ignore(num_examples):
    pass


def greedy(model, prompt, num_tokens, stops=()):
    """Token by token with full forwards: no cache, no padding."""
    ids = list(prompt)
    for _ in range(num_tokens):
        token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture
def prompts(encode, rows):
    return [encode(f"<|user|>{prompt}<|end|><|assistant|>") for prompt, _, _ in rows]


@pytest.mark.parametrize("token_budget", [1, 100, 10_000])
def test_batched_equals_one_by_one(any_model, prompts, token_budget):
    done = []
    with evaluating(any_model):
        answers = generate_answers(
            any_model, prompts, max_new_tokens=12, stops=(), token_budget=token_budget, on_batch=done.append
        )
        expected = [greedy(any_model, prompt, 12) for prompt in prompts]
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) > 1
    assert sum(done) == len(prompts)


def test_the_budget_counts_the_answers(model):
    done = []
    generate_answers(model, [[5] * 8] * 4, max_new_tokens=12, stops=(), token_budget=40, on_batch=done.append)
    assert done == [2, 2]


def test_stops_at_any_stop_token_and_leaves_it_out(model, prompts):
    with evaluating(model):
        free = [greedy(model, prompt, 12) for prompt in prompts]
        stops = {free[0][4], free[1][7], free[2][0]}
        answers = generate_answers(model, prompts, max_new_tokens=12, stops=stops, token_budget=10_000, on_batch=ignore)
        assert answers == [greedy(model, prompt, 12, stops) for prompt in prompts]
    assert answers[2] == []


def test_the_models_own_settings_have_no_say(model, prompts, caplog):
    with evaluating(model):
        expected = [greedy(model, prompt, 8) for prompt in prompts]
        own = model.generation_config
        own.update(do_sample=True, temperature=0.3, top_p=0.9, repetition_penalty=9.0, max_length=3)
        with caplog.at_level(logging.WARNING):
            logging.getLogger("transformers").addHandler(caplog.handler)
            try:
                answers = generate_answers(
                    model, prompts, max_new_tokens=8, stops=(), token_budget=10_000, on_batch=ignore
                )
            finally:
                logging.getLogger("transformers").removeHandler(caplog.handler)
    assert answers == expected
    assert not caplog.records
    assert model.generation_config is own


def test_stop_tokens_come_from_tokenizer_model_and_answers(model, tokenizer, encode):
    [eos], [end], [word] = encode("<|eos|>"), encode("<|end|>"), encode("w")
    whole = TokenizedExample(np.array([word, word, end], dtype=np.int32), np.array([False, True, True]))
    cut_off = TokenizedExample(np.array([word, word], dtype=np.int32), np.array([False, True]))
    assert stop_tokens(model, tokenizer, [cut_off]) == {eos}
    assert stop_tokens(model, tokenizer, [cut_off, whole]) == {eos, end}
    model.generation_config.eos_token_id = 17
    assert stop_tokens(model, tokenizer, []) == {eos, 17}
    model.generation_config.eos_token_id = [17, 18]
    assert stop_tokens(model, tokenizer, []) == {eos, 17, 18}


def test_batches_keep_the_budget_and_take_each_example_once():
    lengths = [5, 40, 3, 12, 12, 9, 1]
    batches = list(batches_within(lengths, 24))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches == [[1], [3, 4], [5, 0], [2, 6]]


def test_batches_count_the_rows_of_each_example():
    assert list(batches_within([10, 10, 10], 50, rows=[3, 2, 4])) == [[0, 1], [2]]


def test_left_padding():
    ids, mask = pad_left([[1, 2, 3], [4]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
