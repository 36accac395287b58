from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mtl.evaluation.batches import evaluating
from mtl.evaluation.options import option_log_likelihoods

PROMPTS = ["Is it good?", "?", "A much longer prompt than the other two, to have padding", "好吗"]
OPTIONS = [["yes", "no", "a long option"], ["yes", "no"], ["x"], ["是", "不是", "👍", "no", ""]]


SHARING = [
    ["the same beginning, and an end", "the same beginning", "the same beginning, but a much longer end of it all"],
    ["same"] * 3,
    ["a", "ab", "abc"],
]


def ignore(num_prompts):
    pass


def full_forward(model, prompt, option):
    ids = torch.tensor([prompt + option])
    log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(option))


@pytest.mark.parametrize("token_budget", [1, 200, 10_000])
def test_equals_separate_full_forwards(any_model, encode, token_budget):
    prompts = [encode(prompt) for prompt in PROMPTS]
    options = [[encode(f"{option}<|end|>") for option in choices] for choices in OPTIONS]
    done = []
    with evaluating(any_model):
        likelihoods = option_log_likelihoods(
            any_model, prompts, options, token_budget=token_budget, on_batch=done.append
        )
        expected = [
            [full_forward(any_model, p, o) for o in choices] for p, choices in zip(prompts, options, strict=True)
        ]
    assert sum(done) == len(prompts)
    for found, right in zip(likelihoods, expected, strict=True):
        assert found == pytest.approx(right, rel=1e-9)


def test_options_of_one_token_need_no_second_forward(model, encode, watch):
    shapes = watch(model)
    prompts, options = [encode("yes or no?"), encode("?")], [[[5], [6]], [[5], [7]]]
    with evaluating(model):
        likelihoods = option_log_likelihoods(model, prompts, options, token_budget=1000, on_batch=ignore)
        assert shapes == [(2, 10)]
        assert likelihoods[0] == pytest.approx([full_forward(model, prompts[0], [t]) for t in (5, 6)], rel=1e-9)


def test_a_prompt_is_read_once(model, encode, watch):
    shapes = watch(model)
    prompt, options = encode("p" * 100), [encode("ab"), encode("cd"), encode("ef")]
    with evaluating(model):
        option_log_likelihoods(model, [prompt], [options], token_budget=1000, on_batch=ignore)
    assert shapes == [(1, 100), (3, 1)]


def test_what_all_prompts_begin_with_is_read_once(model, encode, watch):
    shapes = watch(model)
    prompts = [encode("p" * 100 + end) for end in ("abc", "abd", "ac", "xyz")]
    options = [[encode("ab"), encode("cd")]] * 4
    with evaluating(model):
        option_log_likelihoods(model, prompts, options, token_budget=500, on_batch=ignore)
    assert shapes == [(1, 100), *[(2, 3), (4, 1)] * 2]


def test_options_of_different_lengths_are_not_padded_to_the_longest(model, encode, watch):
    shapes = watch(model)
    options = [[encode("x" * 300), encode("ab"), encode("cd"), encode("ef")]]
    with evaluating(model):
        option_log_likelihoods(model, [encode("?")], options, token_budget=10_000, on_batch=ignore)
    assert shapes == [(1, 1), (1, 299), (3, 1)]


@pytest.mark.parametrize("kind", ["gpt2", "lfm2", "llama", "mistral", "qwen2", "mpt"])
@pytest.mark.parametrize("token_budget", [1, 150, 10_000])
@pytest.mark.parametrize("prompts", SHARING)
def test_exact_under_a_shared_beginning(build_model, encode, kind, token_budget, prompts):
    model, options = build_model(kind), [encode("yes<|end|>"), encode("n"), encode("a longer one<|end|>")]
    rounding = 1e-7 if kind == "mpt" else 1e-9  # its softmax is in float32
    prompts = [encode(prompt) for prompt in prompts]
    with evaluating(model):
        found = option_log_likelihoods(
            model, prompts, [options] * len(prompts), token_budget=token_budget, on_batch=ignore
        )
        for prompt, likelihoods in zip(prompts, found, strict=True):
            assert likelihoods == pytest.approx(
                [full_forward(model, prompt, option) for option in options], rel=rounding
            )


def test_ranks_in_step_change_nothing(model, encode, watch):
    """Another rank's prompts share less, and it has one batch more."""
    prompts = [encode(f"the same beginning {end}") for end in ("of all", "", "of each of them")]
    options = [[encode("a"), encode("b")]] * 3
    settings = {"token_budget": 10_000, "on_batch": ignore}
    with evaluating(model):
        alone = option_log_likelihoods(model, prompts, options, **settings)
        others = iter([2, 0, 4])
        ranks = SimpleNamespace(rank=0, world_size=2, sharded=True, gather=lambda value: [value, next(others)])
        shapes = watch(model)
        found = option_log_likelihoods(model, prompts, options, **settings, ranks=ranks)
    assert [len(shape) for shape in shapes] == [2] * 5  # what four prompts share, and two of two batches
    assert next(others, None) is None
    for values, right in zip(found, alone, strict=True):
        assert values == pytest.approx(right, rel=1e-12)
