"""What llama.cpp's ``convert_hf_to_gguf.py`` needs of a folder, as far as it can be checked without llama.cpp.

It reads config.json (which architecture, which rotary base), tokenizer.json or tokenizer.model, tokenizer_config.json
(special tokens, chat template) and *.safetensors, whose names it maps by the tables of the package ``gguf``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtl.errors import UserError
from mtl.handover.deployment import Deployment
from mtl.models.load import local_folder

NOT_CHECKED = (
    "the conversion itself, for which llama.cpp is needed",
    "whether its converter knows the tokenizer: it goes by a hash of what the tokenizer does, and stops with 'BPE "
    "pre-tokenizer was not recognized' if it does not. The tokenizer is the base model's, unchanged: what converts the "
    "base model converts this folder",
)


def copy_sentencepiece(deployment: Deployment, folder: Path) -> None:
    """Puts the base model's tokenizer.model beside the rest, where there is one: the converter wants it for Gemma."""
    from transformers.utils.hub import cached_file

    source = local_folder(deployment.base.name_or_path, deployment.cache_dir)
    found = cached_file(
        source,
        "tokenizer.model",
        revision=deployment.base.revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is not None:
        (folder / "tokenizer.model").write_bytes(Path(str(found)).read_bytes())


def check_for_gguf(folder: Path) -> tuple[list[str], list[str]]:
    """Checks a folder, and says what has been checked and what could not be, a clause each.

    Raises:
        UserError: The converter would refuse the folder, or make something else of it.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = _architectures(config)
    if "quantization_config" in config:
        raise UserError("--format gguf-ready: the model is quantized, and the converter wants plain weights.")
    checked = [f"config.json names one architecture, {names[0]}, and no quantization"]
    if "rope_theta" in config:
        checked.append("it says the base of the rotary positions in the way of transformers 4, too")
    tensors = _tensor_shapes(folder)
    checked.append(_check_tied(config, tensors))
    checked += _check_tokenizer(folder, config)
    unchecked = list(NOT_CHECKED)
    known, clause = _check_names(config, tensors)
    (checked if known else unchecked).append(clause)
    return checked, unchecked


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures") or []
    if len(names) != 1 or not names[0].endswith("ForCausalLM"):
        raise UserError(
            f"--format gguf-ready: config.json must name one architecture that ends with ForCausalLM, found {names}. "
            "Take --format merged."
        )
    return list(names)


def _tensor_shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118 - no mapping
    return shapes


def _check_tied(config: dict[str, Any], tensors: dict[str, list[int]]) -> str:
    """Without an output matrix of its own llama.cpp takes the embedding, and so it must be."""
    tied, has_output = bool(config.get("tie_word_embeddings")), "lm_head.weight" in tensors
    if config.get("model_type") == "llama" and tied == has_output:
        raise UserError(
            f"--format gguf-ready: tie_word_embeddings={tied}, and lm_head.weight is {'' if has_output else 'not '}"
            "among the weights. Take --format merged."
        )
    return f"the output embedding is {'the input embedding, and saved once' if tied else 'saved with the weights'}"


def _check_tokenizer(folder: Path, config: dict[str, Any]) -> list[str]:
    from gguf import SpecialVocab

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError("--format gguf-ready: the tokenizer has no tokenizer.json. Take a model with a fast tokenizer.")
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    ids = [token["id"] for token in content["added_tokens"]]
    ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    num_rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if num_rows is None or max(ids) >= num_rows:
        raise UserError(f"--format gguf-ready: vocab_size={num_rows} must be above every token's number, {max(ids)}.")
    special = SpecialVocab(folder, load_merges=True)
    if "eos" not in special.special_token_ids or special.chat_template is None:
        raise UserError(
            "--format gguf-ready: the tokenizer's files name no end-of-sequence token, or no chat template."
        )
    found = ", ".join(f"{kind} {number}" for kind, number in special.special_token_ids.items())
    return [
        f"tokenizer.json has {max(ids) + 1:,} tokens for {num_rows:,} rows of the embedding",
        f"the package gguf finds the special tokens ({found}) and the chat template",
    ]


def _check_names(config: dict[str, Any], tensors: dict[str, list[int]]) -> tuple[bool, str]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = config.get("model_type", "")
    known = {name.replace("-", "").replace("_", ""): number for number, name in MODEL_ARCH_NAMES.items()}
    architecture = known.get(kind.replace("-", "").replace("_", ""))
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    if architecture is None or layers is None:
        return False, f"the names of the weights, since the package gguf has no table for {kind!r}"
    names = get_tensor_name_map(architecture, layers)
    strange = [name for name in tensors if names.get_name(name, try_suffixes=(".weight", ".bias")) is None]
    if strange:
        return False, f"{len(strange)} names of weights, {strange[0]} first, which the tables of the package gguf lack"
    return True, f"all {len(tensors)} weights have names that the package gguf knows for {kind!r}"
