"""What is compared with what, and what is aimed at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.examples import PRIVATE_LORA, SHARED_LORA
from benchmarks.measuring import Spec

Quantity = Literal["seconds", "seconds a token", "examples a second", "peak memory", "overhead"]


@dataclass(frozen=True)
class Claim:
    """A line of the table.

    Args:
        what: Its first words.
        quantity: What is compared.
        ours: A variant's name.
        other: Another's; ``None`` for a number that stands alone.
        at_least: How many times better ours shall be.
        at_most: How many times worse ours may be; of a number that stands alone, its limit.
    """

    what: str
    quantity: Quantity
    ours: str
    other: str | None = None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Variants that are measured side by side, and what is claimed of them.

    Args:
        name: On the command line.
        variants: By the names that the claims use.
        claims: Lines of the table.
        steps: Overrides of a run whose batches the variants without ``mtl`` take.
        questions: ``likelihood`` or ``generation``, for variants that answer test questions.
        needs: Modules that are not ours.
        same_work: Whether all variants must count the same examples and tokens.
    """

    name: str
    variants: Mapping[str, Spec]
    claims: Sequence[Claim]
    steps: Sequence[str] | None = None
    questions: str | None = None
    needs: Sequence[str] = ()
    same_work: bool = True


SIXTEEN = (*SHARED_LORA, "batch_size=16")
MEAN, PCGRAD = "surgery=mean", "surgery=pcgrad"


def each(count: int) -> tuple[str, ...]:
    """Overrides for so many examples of each of the eight tasks in every step."""
    return ("sampler=equal", f"batch_size={8 * count}")


def training(*overrides: str, **options: Any) -> Spec:  # noqa: ANN401
    """Steps of ``mtl``."""
    return Spec("product.Training", {"overrides": overrides, **options})


def pcgrad_comparison(count: int, at_most: float) -> Comparison:
    """PCGrad against the plain mean."""
    return Comparison(
        f"pcgrad-{count}",
        {name: training(*SHARED_LORA, *each(count), surgery) for name, surgery in (("mean", MEAN), ("pcgrad", PCGRAD))},
        [Claim(f"PCGrad against mean, 8 tasks x {count}", "seconds", "pcgrad", "mean", at_most=at_most)],
    )


COMPARISONS = [
    Comparison(
        "trl",
        {
            "mtl": training(*SIXTEEN),
            "TRL": Spec("peers.Trl", {}),
            "TRL without checkpointing": Spec("peers.Trl", {"gradient_checkpointing": False}),
        },
        [
            Claim("16 examples against TRL", "seconds", "mtl", "TRL", at_least=2.8),
            Claim("its memory", "peak memory", "mtl", "TRL", at_least=2),
            Claim("the same, activations kept", "seconds", "mtl", "TRL without checkpointing"),
            Claim("its memory", "peak memory", "mtl", "TRL without checkpointing"),
        ],
        steps=SIXTEEN,
        needs=["trl"],
    ),
    Comparison(
        "trl-packing",
        {"mtl": training(*SIXTEEN), "TRL packing": Spec("peers.Trl", {"packing": True})},
        [
            Claim("as many tokens against TRL packing", "seconds a token", "mtl", "TRL packing", at_least=1.8),
            Claim("its memory", "peak memory", "mtl", "TRL packing"),
        ],
        steps=SIXTEEN,
        needs=["trl"],
        same_work=False,
    ),
    Comparison(
        "floor",
        {"mtl": training(*SIXTEEN), "floor": Spec("bare.Floor", {})},
        [Claim("whole step against the floor", "seconds", "mtl", "floor", at_most=1.12)],
        steps=SIXTEEN,
    ),
    pcgrad_comparison(4, 1.10),
    pcgrad_comparison(2, 1.20),
    pcgrad_comparison(1, 1.30),
    Comparison(
        "retained-graph",
        {
            "mtl": training(*SHARED_LORA, *each(2), PCGRAD),
            "retained graph": Spec("bare.ParameterSpaceSurgery", {"mixed": True}),
        },
        [
            Claim("PCGrad against T backwards, 8 tasks x 2", "seconds", "mtl", "retained graph", at_least=6),
            Claim("its memory", "peak memory", "mtl", "retained graph"),
        ],
        steps=(*SHARED_LORA, *each(2)),
    ),
    Comparison(
        "torchjd",
        {"mtl": training(*SHARED_LORA, *each(2), PCGRAD), "TorchJD": Spec("peers.TorchJD", {})},
        [
            Claim("PCGrad against TorchJD, 8 tasks x 2", "seconds", "mtl", "TorchJD"),
            Claim("its memory", "peak memory", "mtl", "TorchJD"),
        ],
        steps=(*SHARED_LORA, *each(2)),
        needs=["torchjd"],
    ),
    Comparison(
        "graphs-alive",
        {
            "mtl": training(*SHARED_LORA, *each(4), PCGRAD),
            "a graph a task": Spec("bare.ParameterSpaceSurgery", {"mixed": False}),
        },
        [
            Claim("PCGrad against a graph a task, 8 tasks x 4", "peak memory", "mtl", "a graph a task", at_least=3),
            Claim("its time", "seconds", "mtl", "a graph a task"),
        ],
        steps=(*SHARED_LORA, *each(4)),
    ),
    Comparison(
        "private-adapters",
        {
            "adapter a task": training(*PRIVATE_LORA, *each(2), MEAN),
            "shared adapter": training(*SHARED_LORA, *each(2), MEAN),
            "switching": Spec("bare.SwitchedAdapters", {}),
        },
        [
            Claim("8 adapters against a shared one", "seconds", "adapter a task", "shared adapter", at_most=1.15),
            Claim("8 adapters against switching", "seconds", "adapter a task", "switching", at_most=1.0),
        ],
        steps=(*SHARED_LORA, *each(2)),
    ),
    Comparison(
        "labels",
        {
            "mtl": Spec("evaluating.Labels", {"overrides": SHARED_LORA}),
            "a forward a label": Spec("evaluating.LabelsOneByOne", {}),
        },
        [Claim("labels by likelihood", "examples a second", "mtl", "a forward a label", at_least=2)],
        questions="likelihood",
        same_work=False,
    ),
    Comparison(
        "generation",
        {
            "mtl": Spec("evaluating.Generation", {"overrides": SHARED_LORA}),
            "one by one": Spec("evaluating.GenerationOneByOne", {}),
        },
        [Claim("generation of 32 tokens", "examples a second", "mtl", "one by one", at_least=4)],
        questions="generation",
        same_work=False,
    ),
    Comparison(
        "overhead-8",
        {"mtl": Spec("product.Overhead", {"overrides": (*SHARED_LORA, *each(2), PCGRAD)})},
        [Claim("all but forward and backward, 8 tasks", "overhead", "mtl", at_most=0.02)],
    ),
    Comparison(
        "overhead-1024",
        {
            "mtl": Spec(
                "product.Overhead",
                {"overrides": (*SHARED_LORA, "batch_size=64", "sampler=temperature", PCGRAD), "num_tasks": 1024},
            )
        },
        [Claim("all but forward and backward, 64 of 1,024 tasks", "overhead", "mtl", at_most=0.02)],
    ),
    Comparison(
        "sampler",
        {
            "16 examples": Spec("product.Draw", {"num_tasks": 1024, "num_examples": 16}),
            "64 examples": Spec("product.Draw", {"num_tasks": 1024, "num_examples": 64}),
        },
        [
            Claim(f"a sampler's draw, 1,024 tasks, {name}", "seconds", name, at_most=0.002)
            for name in ("16 examples", "64 examples")
        ],
    ),
    Comparison(
        "startup",
        {"help": Spec("startup.Help", {}), "train": Spec("startup.FirstForward", {})},
        [
            Claim("`mtl --help`", "seconds", "help", at_most=0.5),
            Claim("`mtl train` to the first forward, warm caches", "seconds", "train", at_most=10),
        ],
    ),
]
