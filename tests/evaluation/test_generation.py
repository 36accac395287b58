from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mtl.data.tokenized import TokenizedExample
from mtl.evaluation.batches import batches_within, evaluating, of_similar_length, pad_left
from mtl.evaluation.generation import generate_answers, stop_tokens
from mtl.evaluation.prompts import cache_may_hold_padding

KINDS = ("gpt2", "lfm2", "llama", "mistral", "qwen2")


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


@pytest.mark.parametrize("token_budget", [1, 200, 10_000])
def test_exact_under_a_shared_beginning(any_model, encode, token_budget):
    prompts = [encode(f"what all begin with{end}") for end in ("", " and more", " and yet a good deal more", "?", "?")]
    with evaluating(any_model):
        expected = [greedy(any_model, prompt, 12) for prompt in prompts]
        stops = {expected[0][3], expected[2][8]}
        for ends in ((), stops):
            answers = generate_answers(
                any_model, prompts, max_new_tokens=12, stops=ends, token_budget=token_budget, on_batch=ignore
            )
            assert answers == [greedy(any_model, prompt, 12, ends) for prompt in prompts]


def test_prompts_of_different_lengths_are_not_padded_to_the_longest(model, watch):
    shapes = watch(model)
    prompts = [[5] * 10, [6] * 300, [7] * 9, [8] * 280]
    with evaluating(model):
        answers = generate_answers(model, prompts, max_new_tokens=3, stops=(), token_budget=10_000, on_batch=ignore)
        assert shapes == [(2, 300), (2, 10), (4, 1), (4, 1)]
        assert answers == [greedy(model, prompt, 3) for prompt in prompts]


def test_rows_that_have_stopped_cost_nothing_more(model, prompts, watch):
    with evaluating(model):
        free = [greedy(model, prompt, 12) for prompt in prompts]
        stops = {tokens[place] for tokens, place in zip(free, (11, 1, 4, 0, 6, 0, 2), strict=True)}
        expected = [greedy(model, prompt, 12, stops) for prompt in prompts]
        shapes = watch(model)
        answers = generate_answers(model, prompts, max_new_tokens=12, stops=stops, token_budget=10_000, on_batch=ignore)
    assert answers == expected
    rows = [rows for rows, length in shapes[3:] if length == 1]  # the prompts' shared beginning, two groups, answers
    assert len(rows) == min(11, max(map(len, answers)))
    for step, num_rows in enumerate(rows, 1):
        writing = sum(len(answer) >= step for answer in answers)
        assert writing <= num_rows < max(4 / 3 * writing + 1, 2)


def test_ranks_in_step_go_on_until_the_slowest_has_its_answers(model, prompts, watch):
    """The other rank writes three tokens more than this one."""
    with evaluating(model):
        stops = {greedy(model, prompt, 5)[4] for prompt in prompts}
        expected = [greedy(model, prompt, 5, stops) for prompt in prompts]
        num_forwards = max(map(len, expected)) + 3
        others = iter([1, 99, 0, *[True] * num_forwards, False])
        ranks = SimpleNamespace(rank=0, world_size=2, sharded=True, gather=lambda value: [value, next(others)])
        shapes = watch(model)
        settings = {"max_new_tokens": 30, "stops": stops, "token_budget": 10_000, "on_batch": ignore}
        assert generate_answers(model, prompts, **settings, ranks=ranks) == expected
    assert next(others, None) is None
    assert len(shapes) == 1 + num_forwards


def test_whose_cache_may_hold_padding(build_model):
    may = {kind: cache_may_hold_padding(build_model(kind), 100) for kind in (*KINDS, "mpt")}
    assert may == {"gpt2": True, "lfm2": False, "llama": True, "mistral": False, "qwen2": True, "mpt": False}
    assert [cache_may_hold_padding(build_model("qwen2"), length) for length in (199, 200)] == [True, False]


def test_groups_of_similar_length():
    lengths = [10, 100, 90, 74, 75, 12, 99, 8]
    groups = list(of_similar_length(lengths))
    assert groups == [[1, 6, 2, 4], [3, 5, 0, 7]]  # 74 positions are few enough to add short ones to
    assert list(of_similar_length([])) == []


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
