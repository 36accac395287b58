"""Surgery out of TorchJD. Shape suffixes: M present tasks, T tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl.surgery.gramian import GramianSurgery
from mtl.surgery.scale import Scale, check_scale

UNFIT = {
    "CRMOGMWeighting": "smooths another one; put mtl.surgery.CRMOGM around this surgery instead",
    "ExcessMTLWeighting": "works on whole gradients, not on their Gramian",
}
# What loss weights do through them; the others let them act partly.
WEIGHTS_ACT = {
    **dict.fromkeys(["Constant", "GradVac", "Mean", "PCGrad", "Random", "Sum"], "yes"),
    **dict.fromkeys(["FairGrad", "MGDA", "MoDo", "SDMGrad"], "reversed"),
    "IMTLG": "no",
}


class TorchJD(GramianSurgery):
    """The coefficients of a weighting of TorchJD, whose methods may be more than those of this package.

    Its draws come from a generator of this object, not from torch's global one. What it remembers is per row, not per
    task: it starts anew whenever other tasks are present than in the call before (TorchJD does so when their number
    changes), and it round-trips through the state. ``SDMGradWeighting`` and ``MoDoWeighting`` are meant for the product
    of two batches' gradients and get the Gramian of one. ``PCDWeighting`` takes the first present task for the primary.

    Source: TorchJD 0.18, ``torchjd.aggregation``; each weighting names its paper.

    Args:
        weighting: Name of a class there, such as ``"UPGradWeighting"``.
        options: Its arguments. A list is a vector with a value for each task [T], of which it gets those present [M].
        seed: Seed of the draws.
        scale: ``"mean"`` has it solve for rows of the mean square norm 1, where its absolute summands against 0 do no
            harm, and divides by the sum of the coefficients that it has for M equal ones, so that equal rows give that
            row; ``"paper"`` leaves it alone.

    Raises:
        ValueError: If TorchJD or a package that the weighting needs is not installed, the weighting is unknown, needs
            more than the Gramian or refuses the options, or the scale is another word.
    """

    def __init__(
        self, weighting: str, options: Mapping[str, Any] | None = None, seed: int = 0, scale: Scale = "mean"
    ) -> None:
        check_scale(scale)
        self._class = weighting_class(weighting)
        self._options = {
            key: value if isinstance(value, str) or not isinstance(value, Sequence) else vector(value)
            for key, value in (options or {}).items()
        }
        self._scale = scale
        self._generator = torch.Generator().manual_seed(seed)
        self._tasks: list[int] | None = None
        self._weighting = self._make(None)
        self.weights_act = WEIGHTS_ACT.get(weighting.removesuffix("Weighting"), "partly")

    def coefficients(self, gramian_MM: Tensor, tasks: Sequence[int] | None = None) -> Tensor:
        gramian_MM = gramian_MM.detach().to("cpu", torch.float64)
        self._prepare(list(range(len(gramian_MM)) if tasks is None else tasks))
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._generator.get_state())
            if self._scale == "mean":
                gramian_MM = gramian_MM / (float(gramian_MM.diagonal().mean()) or 1.0)
            found_M: Tensor = self._weighting(gramian_MM).detach().clone()
            self._generator.set_state(torch.get_rng_state())
            if self._scale == "mean":
                of_equal_rows_M = self._make(self._tasks)(torch.ones_like(gramian_MM))
                found_M /= float(of_equal_rows_M.sum()) or 1.0
            return found_M

    def _make(self, tasks: list[int] | None) -> Any:  # noqa: ANN401
        options = dict(self._options)
        for key, value in options.items():
            if isinstance(value, Tensor) and tasks is not None:
                if len(value) <= max(tasks):
                    raise ValueError(
                        f"options: {key} must have a value for each task, found {len(value)}; add the others"
                    )
                options[key] = value[tasks]
        try:
            return self._class(**options)
        except ImportError as error:
            raise ValueError(f"weighting: must have its packages installed, found {error}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"options: must be those of {self._class.__name__}, found {options}; {error}") from error

    def _prepare(self, tasks: list[int]) -> None:
        if tasks != self._tasks:
            self._tasks, self._weighting = tasks, self._make(tasks)

    def state_dict(self) -> dict[str, Any]:
        memory = {name: value.clone() for name, value in self._weighting.named_buffers()}
        return {"generator": self._generator.get_state(), "tasks": self._tasks, "memory": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._tasks, self._weighting = None, self._make(None)
        if state["tasks"] is None:
            return
        self._prepare(list(state["tasks"]))
        with torch.random.fork_rng(devices=[]):
            self._weighting(torch.eye(len(state["tasks"]), dtype=torch.float64))  # it forgets what it has no size for
        for name, value in state["memory"].items():
            setattr(self._weighting, name, value.clone())


def vector(values: Sequence[float]) -> Tensor:
    """One value for each task [T]."""
    return torch.tensor(list(values), dtype=torch.float64)


def weighting_class(name: str) -> type[Any]:
    """The class of this name in ``torchjd.aggregation``."""
    if name in UNFIT:
        raise ValueError(f"weighting: must work by coefficients of the Gramian, found {name}, which {UNFIT[name]}")
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ValueError("weighting: needs the package torchjd, found none; pip install 'mtl-sft[torchjd]'") from error
    known = [each for each in aggregation.__all__ if each.endswith("Weighting") and each not in {"Weighting", *UNFIT}]
    if name not in known:
        raise ValueError(f"weighting: must be a class of torchjd.aggregation, found {name!r}; there are {known}")
    found: type[Any] = getattr(aggregation, name)
    return found
