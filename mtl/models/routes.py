"""Which positions of a micro-batch go through which adapters, and where the gradients go.

Shape suffix: N parameters whose gradients are in one flat tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtl.interfaces import Segment


class Target(NamedTuple):
    """An adapter by peft's name, and the flat gradients that a backward adds those of its A and B to."""

    adapter: str
    a_gradient_N: Tensor
    b_gradient_N: Tensor


class Gate(NamedTuple):
    """A layer's logits by their name, whose softmax scales the adapters, and the flat gradient to add theirs to."""

    name: str
    gradient_N: Tensor


class Targets(NamedTuple):
    """The adapters of a task, and the gate that mixes them, if one does."""

    adapters: Sequence[Target]
    gate: Gate | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What positions of one matrix product have in common."""
        names = tuple(target.adapter for target in self.adapters)
        return names if self.gate is None else (*names, self.gate.name)

    def same(self, others: Targets) -> bool:
        """Whether the gradients go to the same places; of targets with one key."""
        pairs = zip(self.adapters, others.adapters, strict=True)
        return all(a[1] is b[1] and a[2] is b[2] for a, b in pairs)


class Span(NamedTuple):
    """Positions with the same targets."""

    start: int
    stop: int
    targets: Targets


class Block(NamedTuple):
    """Neighbouring positions that pass through the same adapters: matrix products of a forward."""

    spans: Sequence[Span]

    @property
    def targets(self) -> Targets:
        """Those of the first span: all have the same adapters."""
        return self.spans[0].targets

    @property
    def positions(self) -> slice:
        """Of the micro-batch."""
        return slice(self.spans[0].start, self.spans[-1].stop)


def make_blocks(segments: Sequence[Segment], targets: Mapping[int, Targets]) -> list[Block]:
    """The fewest blocks and spans for ``segments``, given each task's targets."""
    blocks: list[Block] = []
    for task, start, stop in segments:
        span = Span(start, stop, targets[task])
        if not blocks or blocks[-1].positions.stop != start or blocks[-1].targets.key != span.targets.key:
            blocks.append(Block([span]))
            continue
        spans = list(blocks[-1].spans)
        if spans[-1].targets.same(span.targets):
            span = Span(spans.pop().start, stop, span.targets)
        blocks[-1] = Block([*spans, span])
    return blocks


class Route:
    """The blocks of the forwards to come, the same for all layers; ``None``: peft's own forward."""

    def __init__(self) -> None:
        self.blocks: Sequence[Block] | None = None
        # What autograd calls the layers' backward for: the parameters themselves stay out of its graph, and so do the
        # hooks on them.
        self.anchor = torch.empty(0, requires_grad=True)
