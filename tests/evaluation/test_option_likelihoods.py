from __future__ import annotations

import pytest
import torch

from mtl.evaluation.batches import evaluating
from mtl.evaluation.options import option_log_likelihoods

PROMPTS = ["Is it good?", "?", "A much longer prompt than the other two, to have padding", "好吗"]
OPTIONS = [["yes", "no", "a long option"], ["yes", "no"], ["x"], ["是", "不是", "👍", "no", ""]]


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


def test_options_of_one_token_need_no_second_forward(model, encode, monkeypatch):
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    prompts, options = [encode("yes or no?"), encode("?")], [[[5], [6]], [[5], [7]]]
    with evaluating(model):
        likelihoods = option_log_likelihoods(model, prompts, options, token_budget=1000, on_batch=lambda n: None)
        assert len(calls) == 1
        assert likelihoods[0] == pytest.approx([full_forward(model, prompts[0], [t]) for t in (5, 6)], rel=1e-9)


def test_a_prompt_is_encoded_once(model, encode, monkeypatch):
    positions = []
    forward = model.forward

    def counting(**inputs):
        positions.append(inputs["input_ids"].numel())
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", counting)
    prompt, options = encode("p" * 100), [encode("ab"), encode("cd"), encode("ef")]
    with evaluating(model):
        option_log_likelihoods(model, [prompt], [options], token_budget=1000, on_batch=lambda n: None)
    assert positions == [100, 3]
