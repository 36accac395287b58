"""What an adapter is like, in peft's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from mtl.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

# Others, such as pissa or loftq, take the adapter out of the base weights, which all adapters must leave alone.
INITIALISATIONS = (True, "gaussian", "orthogonal")


def lora_config(
    model: nn.Module,
    rank: int,
    alpha: float | None,
    *,
    lora_dropout: float,
    target_modules: Sequence[str] | None,
    init_lora_weights: bool | str,
    use_rslora: bool,
    use_dora: bool = False,
) -> LoraConfig:
    """peft's config of one adapter; the arguments are those of :class:`LoraLayout`.

    Raises:
        UserError: The initial values would change the base model or need another rank, or the dropout is no share.
    """
    from peft import LoraConfig

    if init_lora_weights not in INITIALISATIONS:
        raise UserError(
            f"adapters.init_lora_weights={init_lora_weights}: must be true, gaussian or orthogonal; others change the "
            "base weights, which all tasks share. Take one of these."
        )
    if init_lora_weights == "orthogonal" and rank % 2:
        raise UserError(f"adapters.init_lora_weights=orthogonal: needs even ranks, found {rank}. Correct one of them.")
    if not 0 <= lora_dropout < 1:
        raise UserError(f"adapters.lora_dropout={lora_dropout}: must be a share in [0, 1). Correct the value.")
    return LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]
        lora_dropout=lora_dropout,
        target_modules=sorted(target_modules) if target_modules is not None else linear_layer_names(model),
        init_lora_weights=init_lora_weights,  # type: ignore[arg-type]
        use_rslora=use_rslora,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )


def linear_layer_names(model: nn.Module) -> list[str]:
    """The distinct last names of all linear layers but the output embedding, sorted.

    Explicit names keep ``adapter_config.json`` small and stable; peft's ``all-linear`` expands to an unordered list
    of every module.
    """
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()  # type: ignore[operator]
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    }
    if not found:
        raise UserError(
            "adapters.target_modules: the model has no linear layer. Name its layers, or take adapters=full."
        )
    return sorted(found)
