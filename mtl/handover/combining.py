"""One adapter for several tasks, out of their adapters, by peft's ``add_weighted_adapter``.

With the weight difference ``D_t = s_t B_t A_t`` of a layer and weights ``w_t``:

- ``sum``: ``sum_t w_t D_t``, exactly: the adapters one beside the other (peft's ``cat``).
- ``ties``: of each ``D_t`` the share ``density`` of largest magnitude stays; at each place, the mean of ``w_t D_t``
  over the tasks whose sign is that of the sum (Yadav et al., "TIES-Merging", NeurIPS 2023).
- ``dare_linear``: of each ``D_t`` a random share ``density`` stays and is divided by it; then the sum. ``dare_ties``:
  the same with the mean of ``ties`` (Yu et al., "Language Models are Super Mario", ICML 2024).

peft's ``linear``, ``ties`` and ``dare_*`` work on A and B apart, and their products are something else. What works on
``D_t`` is called ``*_svd`` and leaves its best approximation of a rank that is chosen.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from mtl.errors import UserError
from mtl.handover.loading import add_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

COMBINATIONS = {"sum": "cat", "ties": "ties_svd", "dare_ties": "dare_ties_svd", "dare_linear": "dare_linear_svd"}
NAME = "combined"


@dataclass(frozen=True)
class Combination:
    """How adapters become one.

    Args:
        method: A key of ``COMBINATIONS``.
        weights: One for each task.
        density: Which share of a weight difference stays; for all but ``sum``.
        seed: Of what DARE draws.
        rank: Of the result; the sum of the adapters' ranks if not given.

    Raises:
        UserError: An option is out of its range, or without effect.
    """

    method: str
    weights: Sequence[float]
    density: float = 0.5
    seed: int = 0
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.method not in COMBINATIONS:
            raise UserError(f"--combine {self.method}: must be one of {', '.join(COMBINATIONS)}.")
        if not 0 < self.density <= 1:
            raise UserError(f"--density {self.density}: must be above 0 and at most 1.")
        if self.rank is not None and (self.rank < 1 or self.method == "sum"):
            raise UserError(f"--rank {self.rank}: must be positive, and sum has none: it is exact at the sum of ranks.")


def combine(
    model: nn.Module, adapters: Sequence[Path], combination: Combination, folder: Path, *, exact: bool
) -> float:
    """Writes the combined adapter as a standard PEFT folder.

    Args:
        model: The base model, without adapters; it is used up.
        adapters: The folders of the tasks' adapters.
        combination: How.
        folder: Where to; its parent exists.
        exact: Leave nothing out, at whatever rank that takes: for an adapter that is merged at once.

    Returns:
        How far the result is from the combination, by the Frobenius norm over all layers relative to that of the
        combination: what the rank leaves out.

    Raises:
        UserError: An adapter can't be read, or is a DoRA.
    """
    for adapter in adapters:
        if json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("use_dora"):
            raise UserError(
                f"{adapter}: is a DoRA, whose norms no other adapter's can be added to. Export it by itself."
            )
    peft_model: Any = model
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        peft_model = add_adapter(peft_model, adapter, name)
    layers = lora_layers(peft_model)
    rank_of_sum = sum(peft_model.peft_config[name].r for name in names)
    full_rank = max(min(layer.in_features, layer.out_features) for layer in layers)
    with drawing_from(combination.seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density .* is greater than or equal to 1", UserWarning)
        peft_model.base_model.add_weighted_adapter(
            names,
            list(combination.weights),
            NAME,
            combination_type=COMBINATIONS[combination.method],
            svd_rank=full_rank,
            svd_full_matrices=False,
            density=combination.density,
        )
    if combination.method == "sum":
        rank = rank_of_sum
    else:
        rank = full_rank if exact else min(combination.rank or rank_of_sum, full_rank)
    left_out = cut(layers, rank)
    config = peft_model.peft_config[NAME]
    # All scales are in the new factors already, and rsLoRA's alpha / sqrt(r) would come on top.
    config.use_rslora, config.r, config.lora_alpha = False, rank, rank
    staging = folder.parent / ".combining"
    peft_model.save_pretrained(str(staging), selected_adapters=[NAME])
    (staging / NAME).rename(folder)
    shutil.rmtree(staging)
    return left_out


def cut(layers: Sequence[Any], rank: int) -> float:
    """Leaves the first ``rank`` components of every layer, the largest; returns the relative norm of the others.

    peft gives them in order, with A orthonormal, so that the norm of a component is that of its column of B. A layer
    with fewer rows or columns than the rank is filled up with zeros.
    """
    kept, lost = 0.0, 0.0
    for layer in layers:
        if NAME in layer.lora_A:
            a_rI, b_Or = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            kept += b_Or[:, :rank].double().square().sum().item()
            lost += b_Or[:, rank:].double().square().sum().item()
            missing = max(rank - len(a_rI), 0)
            a_rI.data = F.pad(a_rI.data[:rank], (0, 0, 0, missing)).contiguous()
            b_Or.data = F.pad(b_Or.data[:, :rank], (0, missing)).contiguous()
    return float((lost / max(kept + lost, 1e-300)) ** 0.5)


def lora_layers(model: nn.Module) -> list[Any]:
    """The layers that peft has put a LoRA on."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seeds torch's generator of the CPU, which DARE draws from, and puts it back."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
