"""What llama.cpp's converter needs, and a conversion by the package gguf that follows the converter's steps."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mtl.errors import UserError
from mtl.handover.gguf_checks import check_for_gguf


@pytest.fixture
def exported(trained, mtl, tmp_path):
    run = trained("shared_and_per_task")
    mtl("export", run.folder, "--task", "sums", "--format", "gguf-ready", "--output", tmp_path / "out")
    return tmp_path / "out"


def rewrite(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_card_has_the_commands_and_the_checks(exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "python convert_hf_to_gguf.py FOLDER --outfile model-f32.gguf --outtype f32" in card
    assert "all 21 weights have names that the package gguf knows for 'llama'" in card
    assert "the conversion itself" in card.split("Not checked:")[1]


def test_older_readers_find_what_they_look_for(exported):
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert "quantization_config" not in config
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["eos_token"] == "<|im_end|>"


def test_gguf_of_the_weights_computes_the_same(exported, trained, plain_logits, tmp_path):
    """Names by gguf's table and rows of Q and K in the order of llama.cpp, as its converter does; read back dense."""
    import gguf
    from transformers import GgufConfig

    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(exported / "model.safetensors").items():
        if (kind := name.split(".")[-2]) in heads:
            halves = tensor.reshape(heads[kind], 2, tensor.shape[0] // heads[kind] // 2, -1)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="model.gguf", dtype=torch.float32, quantization_config=dense
    )
    torch.testing.assert_close(plain_logits(model), trained("shared_and_per_task").logits["sums"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(architectures=["LlamaModel"]), "must name one architecture"),
        ("config.json", lambda c: c.update(quantization_config={}), "is quantized"),
        ("config.json", lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings=True"),
        ("config.json", lambda c: c.update(vocab_size=100), "vocab_size=100"),
        ("tokenizer_config.json", lambda c: c.update(eos_token=None), "eos 1"),
    ],
)
def test_folders_that_the_converter_would_refuse(exported, file, change, message):
    rewrite(exported / file, change)
    if file == "tokenizer_config.json":  # config.json says it, too
        assert any(message in clause for clause in check_for_gguf(exported)[0])
        rewrite(exported / "config.json", lambda c: c.update(eos_token_id=None))
        message = "name no end-of-sequence token"
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        check_for_gguf(exported)


def test_unknown_names_and_architectures_are_said(exported):
    weights = load_file(exported / "model.safetensors")
    save_file({**weights, "extra.matrix": torch.zeros(1)}, exported / "model.safetensors")
    assert any("extra.matrix" in clause for clause in check_for_gguf(exported)[1])
    rewrite(exported / "config.json", lambda c: c.update(model_type="newest"))
    assert any("no table for 'newest'" in clause for clause in check_for_gguf(exported)[1])


def test_a_sentencepiece_file_comes_along(trained, mtl, tiny_folder, tmp_path):
    from dataclasses import replace

    from mtl.handover.deployment import open_run
    from mtl.handover.gguf_checks import copy_sentencepiece

    deployment = open_run(trained("shared_and_per_task").folder)
    copy_sentencepiece(deployment, tmp_path)
    assert not list(tmp_path.iterdir())
    base = tmp_path / "base"
    base.mkdir()
    for name in ("model.safetensors", "tokenizer.model"):
        (base / name).write_bytes(b"pieces")
    copy_sentencepiece(replace(deployment, base=replace(deployment.base, name_or_path=str(base))), tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == b"pieces"
