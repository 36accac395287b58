"""Weights with an adapter merged into them, as a plain model folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtl.errors import UserError
from mtl.handover.deployment import Deployment
from mtl.handover.loading import add_adapter, logits_of
from mtl.models.load import load_model, local_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")
PROBES = (8, 64)  # rows and positions of random tokens that an adapter and its merged weights are compared on


def merged_model(deployment: Deployment, adapter: Path | None) -> tuple[Any, float]:
    """The model with an adapter merged, and how far that has moved its logits.

    That is the norm of the difference to the model with the adapter beside it, on random tokens, relative to the norm
    of its logits: rounding, unless something is wrong.

    Raises:
        UserError: Model or adapter can't be loaded, or hold numbers that are not finite.
    """
    model = load_untied(deployment, [] if adapter is None else [adapter])
    if adapter is None:
        return model, 0.0
    peft_model: Any = add_adapter(model, adapter, "merged")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.get_input_embeddings().num_embeddings, PROBES, generator=generator)
    beside = logits_of(model, tokens)
    try:
        merged = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # peft's check of what is not finite
        raise UserError(f"{adapter}: {error}. Train again.") from error
    difference = torch.linalg.vector_norm(logits_of(merged, tokens) - beside) / torch.linalg.vector_norm(beside)
    return merged, float(difference)


def load_untied(deployment: Deployment, adapters: Sequence[Path]) -> Any:  # noqa: ANN401
    """The model to merge these adapters into, in float32 (float64 if the run was)."""
    dtype = "float64" if deployment.model.dtype == "float64" else "float32"
    settings = replace(deployment.model, dtype=dtype, gradient_checkpointing=False)
    model = load_model(settings, deployment.cache_dir)
    for adapter in adapters:
        untie(model, adapter)
    return model


def untie(model: nn.Module, adapter: Path) -> None:
    """Gives input and output embeddings weights of their own where an adapter changes only one of them."""
    any_model: Any = model
    embedding, output = any_model.get_input_embeddings(), any_model.get_output_embeddings()
    if output is None or output.weight is not embedding.weight:
        return
    targets = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    names = [name for name, module in model.named_modules() if module is embedding or module is output]
    if any(name.rsplit(".", 1)[-1] in targets for name in names):
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        any_model.config.tie_word_embeddings = False


def checkpoint_dtype(deployment: Deployment) -> str:
    """The dtype that the weights of the base model come in, as far as it is one of ``DTYPES``."""
    from transformers import AutoConfig

    model = deployment.model
    config: Any = AutoConfig.from_pretrained(
        local_folder(model.name_or_path, deployment.cache_dir),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    name = str(config.get_text_config().dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def write_model(model: Any, folder: Path, dtype: str) -> None:  # noqa: ANN401
    """Writes safetensors and a config that older readers understand, too.

    transformers 5 keeps the base of rotary positions in ``rope_parameters`` alone; version 4, and converters built on
    it, look for ``rope_theta`` and would silently take their default.
    """
    model.to(getattr(torch, dtype)).save_pretrained(str(folder))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config.setdefault("rope_theta", theta)
    for key in ("_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
