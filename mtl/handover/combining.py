"""One adapter, or merged weights, for several tasks, out of the tasks' adapters, by peft's own arithmetic.

With the weight difference ``D_t = s_t B_t A_t`` of a layer and weights ``w_t``:

- ``sum``: ``sum_t w_t D_t``. As an adapter exactly: the factors one beside the other (peft's ``cat``).
- ``ties``: of each ``D_t`` the share ``density`` of largest magnitude stays; at each place, the mean of ``w_t D_t``
  over the tasks whose sign is that of the sum (Yadav et al., "TIES-Merging", NeurIPS 2023).
- ``dare_linear``: of each ``D_t`` a random share ``density`` stays and is divided by it; then the sum. ``dare_ties``:
  the same with the mean of ``ties`` (Yu et al., "Language Models are Super Mario", ICML 2024).

peft's ``linear``, ``ties`` and ``dare_*`` adapters combine A and B apart, and the products are something else. Here
they are applied to ``D_t``, layer by layer; an adapter then holds the best approximation of a rank that is chosen.

Shape suffixes: I inputs and O outputs of a layer, r rank.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtl.errors import UserError
from mtl.handover.loading import add_adapter

METHODS = {"sum": "task_arithmetic", "ties": "ties", "dare_ties": "dare_ties", "dare_linear": "dare_linear"}
NAME = "combined"
OVERSAMPLING = 16  # more directions than the rank, for a randomized decomposition that is as good as an exact one
OnLayer = Callable[[int, int], None]


@dataclass(frozen=True)
class Combination:
    """How adapters become one.

    Args:
        method: A key of ``METHODS``.
        weights: One for each task.
        density: Which share of a weight difference stays; for all but ``sum``.
        seed: Of what DARE draws.
        rank: Of the adapter; the sum of the tasks' ranks if not given.

    Raises:
        UserError: An option is out of its range, or without effect.
    """

    method: str
    weights: Sequence[float]
    density: float = 0.5
    seed: int = 0
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"--combine {self.method}: must be one of {', '.join(METHODS)}.")
        if not 0 < self.density <= 1:
            raise UserError(f"--density {self.density}: must be above 0 and at most 1.")
        if self.rank is not None and (self.rank < 1 or self.method == "sum"):
            raise UserError(f"--rank {self.rank}: must be positive, and sum has none: it is exact at the sum of ranks.")


def write_combined(
    model: nn.Module, adapters: Sequence[Path], combination: Combination, folder: Path, on_layer: OnLayer
) -> float:
    """Writes the combined adapter as a standard PEFT folder.

    Args:
        model: The base model, without adapters; it is used up.
        adapters: The folders of the tasks' adapters.
        combination: How.
        folder: Where to; its parent exists.
        on_layer: Called with the layers done and to do.

    Returns:
        What the rank leaves out: the Frobenius norm of the difference over all layers, relative to the combination's.

    Raises:
        UserError: An adapter can't be read or combined.
    """
    peft_model, names = with_all(model, adapters)
    rank = sum(peft_model.peft_config[name].r for name in names)
    if combination.method == "sum":
        peft_model.base_model.add_weighted_adapter(names, list(combination.weights), NAME, combination_type="cat")
        # The scales are in the new A already, and peft would put rsLoRA's on top.
        peft_model.peft_config[NAME].use_rslora = False
        staging = folder.parent / ".combining"
        peft_model.save_pretrained(str(staging), selected_adapters=[NAME])
        (staging / NAME).rename(folder)
        shutil.rmtree(staging)
        return 0.0
    rank = combination.rank or rank
    tensors, squares, left_out = {}, 0.0, 0.0
    for place, layer, difference in combined_differences(peft_model, names, combination, on_layer):
        difference_OI = difference.T if getattr(layer, "fan_in_fan_out", False) else difference
        a_rI, b_Or = factors(difference_OI, rank)
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = a_rI, b_Or
        square = difference.double().square().sum().item()
        squares += square
        left_out += max(square - b_Or.double().square().sum().item(), 0.0)  # A is orthonormal
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapters[0] / "adapter_config.json").read_text(encoding="utf-8"))
    targets = {target for name in names for target in peft_model.peft_config[name].target_modules}
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config["target_modules"] = sorted(targets)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return float((left_out / max(squares, 1e-300)) ** 0.5)


def merge_combined(
    model: nn.Module, adapters: Sequence[Path], combination: Combination, on_layer: OnLayer
) -> nn.Module:
    """The model with the combination merged into its weights, where no rank limits it.

    The arguments and errors are those of :func:`write_combined`.
    """
    peft_model, names = with_all(model, adapters)
    for _, layer, difference in combined_differences(peft_model, names, combination, on_layer):
        layer.get_base_layer().weight.data += difference
    merged: nn.Module = peft_model.unload()
    return merged


def with_all(model: nn.Module, adapters: Sequence[Path]) -> tuple[Any, list[str]]:
    """The model with all adapters, and their names."""
    for adapter in adapters:
        if json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("use_dora"):
            raise UserError(f"{adapter}: is a DoRA, whose norms can't be added to another's. Export it by itself.")
    peft_model: Any = model
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        peft_model = add_adapter(peft_model, adapter, name)
    return peft_model, names


def combined_differences(
    peft_model: nn.Module, names: Sequence[str], combination: Combination, on_layer: OnLayer
) -> Iterator[tuple[str, Any, Tensor]]:
    """Each layer with adapters: its name, itself, and what is to be added to its weights, in their shape."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import merge_utils

    layers: list[tuple[str, Any]] = [
        (place, layer) for place, layer in peft_model.named_modules() if isinstance(layer, LoraLayer)
    ]
    combine = getattr(merge_utils, METHODS[combination.method])
    options: list[Any] = [] if combination.method == "sum" else [combination.density]
    for number, (place, layer) in enumerate(layers):
        on_layer(number, len(layers))
        if not layer.lora_A:
            raise UserError(f"--combine {combination.method}: {place} is not linear. Take --combine sum.")
        own = [(name, weight) for name, weight in zip(names, combination.weights, strict=True) if name in layer.lora_A]
        deltas = [layer.get_delta_weight(name).detach() for name, _ in own]
        weights = torch.tensor([weight for _, weight in own])
        with drawing_from(combination.seed, number), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The density .* is greater than or equal to 1", UserWarning)
            difference = combine(deltas, weights, *options)
        yield place, layer, difference
    on_layer(len(layers), len(layers))


def factors(difference_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``A`` [r, I] with orthonormal rows, or rows of zeros, and ``B`` [O, r] whose product is nearest to a matrix."""
    largest = min(difference_OI.shape)
    if 2 * (rank + OVERSAMPLING) < largest:
        with drawing_from(0, 0):
            u, s, v = torch.svd_lowrank(difference_OI, q=rank + OVERSAMPLING, niter=4)
    else:
        u, s, vh = torch.linalg.svd(difference_OI, full_matrices=False)
        v = vh.T
    missing = max(rank - len(s), 0)
    a_rI = nn.functional.pad(v[:, :rank].T, (0, 0, 0, missing))
    b_Or = nn.functional.pad(u[:, :rank] * s[:rank], (0, missing))
    return a_rI.contiguous(), b_Or.contiguous()


@contextmanager
def drawing_from(seed: int, layer: int) -> Iterator[None]:
    """Seeds torch's generator of the CPU, which DARE draws from, and puts it back."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed * 1_000_003 + layer)  # other numbers in each layer
    try:
        yield
    finally:
        torch.set_rng_state(before)
