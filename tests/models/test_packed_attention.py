"""Packed examples see only themselves, whatever the model's attention is told."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mtl.models.attention
from mtl.data.batching import stack
from mtl.data.tokenized import TokenizedExample
from mtl.models.attention import PACKED, knows_lengths, pack_attention
from mtl.models.forward import packing_is_exact, target_nll
from mtl.models.precision import keep_float64

WIDTHS = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": ("llama", {}),
    "mistral, window shorter than the examples": ("mistral", {"sliding_window": 3}),
    "mistral, window as long as the longest": ("mistral", {"sliding_window": 11}),
    "gemma3, layers of both kinds": ("gemma3_text", {"sliding_window": 4, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
}


def model_of(name, **more):
    family, options = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **WIDTHS, **options, **more, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    pack_attention(model)
    keep_float64(model)
    return model


def examples(lengths=(11, 5, 2, 9)):
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, 64, length).astype(np.int32) for length in lengths]
    return [(task, TokenizedExample(ids, ids >= 0)) for task, ids in enumerate(drawn)]


def alone(model):
    return torch.cat([target_nll(model, stack([[pair]])) for pair in examples()])


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_are_those_of_the_examples_alone(name):
    model = model_of(name)
    assert knows_lengths(model)
    packed = target_nll(model, stack([examples()]))
    assert torch.allclose(packed, alone(model), rtol=1e-12, atol=1e-12)
    two_rows = target_nll(model, stack([examples()[:2], examples()[2:]]))
    assert torch.allclose(two_rows, alone(model), rtol=1e-12, atol=1e-12)
    assert packing_is_exact(model)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_transformers_own_attention_where_nothing_is_packed(name):
    model = model_of(name)
    ids = torch.arange(22).view(2, 11) % 64
    with torch.no_grad():
        found = model(input_ids=ids).logits
        answer = model.generate(ids, max_new_tokens=6, do_sample=False)
        model.set_attn_implementation("sdpa")
        assert torch.equal(found, model(input_ids=ids).logits)
        assert torch.equal(answer, model.generate(ids, max_new_tokens=6, do_sample=False))


def test_gradients_of_packed_examples_are_those_of_the_examples_alone():
    model = model_of("llama")
    found = []
    for losses in (lambda: alone(model), lambda: target_nll(model, stack([examples()]))):
        model.zero_grad()
        losses().sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-12


def test_the_examples_are_really_taken_one_by_one(monkeypatch):
    """Else the mask would do, and equal numbers would say nothing."""
    lengths = []
    real = mtl.models.attention.F.scaled_dot_product_attention

    def spy(query, *args, **kwargs):
        lengths.append(query.shape[2])
        return real(query, *args, **kwargs)

    monkeypatch.setattr(mtl.models.attention.F, "scaled_dot_product_attention", spy)
    target_nll(model_of("llama"), stack([examples()]))
    assert sorted(lengths) == sorted([11, 5, 2, 9] * 4)


def test_other_choices_stay():
    config = AutoConfig.for_model("llama", **WIDTHS)
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    pack_attention(eager)
    assert eager.config._attn_implementation == "eager"
    assert not knows_lengths(eager)
    chunked = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **WIDTHS))
    chunked.config.attention_chunk_size = 4
    pack_attention(chunked)
    assert chunked.config._attn_implementation == "sdpa"


def test_the_name_stays_out_of_what_is_saved(tmp_path):
    """A folder that only this library could load would be no standard model."""
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text(encoding="utf-8")
