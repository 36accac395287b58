"""The contracts between the parts of ``mtl``, as types.

Shape suffixes, used everywhere: T tasks, M present tasks (those with an example in this step), N shared trainable
parameters, B examples of a step, S positions, V vocabulary.

Strategies are structural: any class with these methods works, nothing has to be registered or inherited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class Stateful(Protocol):
    """State that survives a checkpoint exactly: plain JSON values and tensors, no pickle."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass(frozen=True)
class TaskFeedback:
    """What a step (or an evaluation) says about the tasks; reduced over all ranks, so identical on each.

    Args:
        step: The optimizer step it belongs to, counted over all stages from 0.
        tasks: Indices of the M present tasks, ascending. Absent tasks have no entry anywhere.
        counts_M: Examples of each present task in the step.
        losses_M: Mean negative log-likelihood per target token of each present task [nats].
        losses_after_M: The same examples after the step; only for strategies that declare the need.
        gramian_MM: Raw Gramian ``G0`` of the unweighted per-task gradients; only where rows were computed.
        validation: Task index to scores of an evaluation: ``"loss"`` [nats per target token] and ``"score"`` (the
            task's metric in [0, 1], higher is better; missing where only the loss was evaluated). The evaluation
            before training comes as a feedback with no present task.
        num_targets_M: Target tokens of each present task in the step: what its loss is the mean over.
    """

    step: int
    tasks: Sequence[int]
    counts_M: Sequence[int]
    losses_M: Tensor
    losses_after_M: Tensor | None = None
    gramian_MM: Tensor | None = None
    validation: Mapping[int, Mapping[str, float]] | None = None
    num_targets_M: Sequence[int] | None = None


class TaskSampler(Stateful, Protocol):
    """Decides how many examples of each task a step sees.

    Adaptive ones may have ``needs`` (out of ``"losses_after"``, ``"scores"``) and ``signals``: what their probabilities
    go by, a name to its value for each task [T], for the log.
    """

    @property
    def probabilities(self) -> Sequence[float]: ...  # [T], sums to 1

    def counts(self, num_examples: int) -> Sequence[int]: ...  # [T], sums to num_examples

    def update(self, feedback: TaskFeedback) -> None: ...  # no-op unless adaptive


class LossWeighter(Stateful, Protocol):
    """Decides how much each task's loss counts.

    ``needs`` names what it must see. With ``"losses"`` or ``"gramian"``, ``weights`` is asked after the backward and
    sees the *current* step's; else before it, without feedback. ``"losses_after"`` gives ``update`` the losses of the
    same examples after the step, at the price of a forward; ``"validation"`` and ``"scores"`` come with evaluations.
    ``weights`` changes no state.
    """

    needs: frozenset[str]

    def weights(self, feedback: TaskFeedback | None) -> Tensor: ...  # [T] float64 on the CPU, detached

    def update(self, feedback: TaskFeedback) -> None: ...


class GradientSurgery(Stateful, Protocol):
    """Combines the tasks' gradient rows into one gradient.

    ``weights_act`` says what loss weights do through it: ``"yes"``, ``"partly"``, ``"no"`` or ``"reversed"``.
    """

    weights_act: str

    def __call__(self, grads_MN: Tensor, tasks: Sequence[int] | None = None) -> Tensor: ...  # [N]


class Segment(NamedTuple):
    """Positions of one task, counted over the rows of a micro-batch as if they stood one after the other."""

    task: int
    start: int
    stop: int


class AdapterLayout(Protocol):
    """Which trainable parameters exist, and which of them a task trains."""

    default_learning_rate: float

    def activate(self, task: int | None) -> AbstractContextManager[None]: ...  # None: the base model, no adapter

    def shared_parameters(self) -> list[nn.Parameter]: ...

    def private_parameters(self, task: int) -> list[nn.Parameter]: ...

    def idle_parameters(self, tasks: Sequence[int]) -> list[nn.Parameter]: ...  # shared, but by none of these tasks

    def parameters(self) -> list[nn.Parameter]: ...

    def named_parameters(self) -> dict[str, nn.Parameter]: ...  # the same ones, by their names in the model

    def joined(self) -> AbstractContextManager[None]: ...  # what is exported acts, and nothing trains

    # What a user deploys; every rank calls it, one of them with ``write``.
    def export(self, folder: Path, task_names: Sequence[str], *, write: bool = True) -> None: ...


@runtime_checkable
class RoutingLayout(AdapterLayout, Protocol):
    """A layout that can also send each position of one forward through its own task's adapters.

    ``can_route`` says whether it can on this model. The backward adds the gradients to buffers instead of ``.grad``:
    those of the shared parameters to the row of ``shared_RN`` that ``rows`` gives each task, those of a task's private
    parameters to its flat buffer.
    """

    can_route: bool

    def route(
        self, segments: Sequence[Segment], shared_RN: Tensor, rows: Mapping[int, int], private: Mapping[int, Tensor]
    ) -> AbstractContextManager[None]: ...
