"""DeepSpeed ZeRO, as an extra: the frozen weights sharded (stage 3), or the optimizer of the shared parameters.

The engine is DeepSpeed's own, on the process group that accelerate has made. It never sees a loss of ours: what tasks
share is combined from their rows, and only then handed to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtl.distributed import Distributed
from mtl.errors import UserError
from mtl.interfaces import AdapterLayout

DTYPES = (torch.float32, torch.bfloat16)
MASTER = "master"  # in an optimizer's state: the float32 parameter that a bfloat16 one is rounded from


def shard_frozen(model: nn.Module, layout: AdapterLayout, distributed: Distributed) -> None:
    """Spreads the frozen weights over the ranks (ZeRO stage 3), in place; what is trained stays whole on each.

    Every forward and backward is a collective from then on.

    Raises:
        UserError: Nothing is frozen.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "launch.sharding=zero3: shards what is frozen, and adapters=full freezes nothing. Take launch=fsdp2, which "
            "shards what is trained, or launch.sharding=zero2."
        )
    trained = layout.parameters()
    with detached(model, set(trained)):
        engine_of(model, None, distributed, stage=3)
    for parameter in trained:
        parameter.data = parameter.data.to(distributed.device)


@contextmanager
def detached(model: nn.Module, parameters: set[nn.Parameter]) -> Iterator[None]:
    """Takes the modules that hold nothing but these parameters out of the model until the block ends."""
    taken = []
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            held = [] if child is None else list(child.parameters())
            if held and all(parameter in parameters for parameter in held):
                taken.append((module, name, child))
                module._modules[name] = nn.Identity()
    try:
        yield
    finally:
        for module, name, child in taken:
            module._modules[name] = child


def engine_of(module: nn.Module, optimizer: Optimizer | None, distributed: Distributed, *, stage: int) -> Any:  # noqa: ANN401
    """DeepSpeed's engine around a module, all of whose parameters have one dtype.

    Raises:
        UserError: DeepSpeed is not installed, or has not this dtype.
    """
    if distributed.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"launch.sharding=zero{stage}: needs DeepSpeed. Run: pip install 'mtl-sft[deepspeed]'."
        ) from error
    dtype = next(module.parameters()).dtype
    if dtype not in DTYPES[: 1 if stage == 0 else None]:
        known = "float32" if stage == 0 else "float32 or bfloat16"
        raise UserError(f"launch.sharding=zero{stage}: needs {known} weights, not {dtype}. Set model.dtype.")
    config = {
        "train_micro_batch_size_per_gpu": 1,  # must be given; batches are the loop's affair
        "gradient_clipping": 0.0,  # so is clipping
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        model_parameters=None if optimizer is None else list(module.parameters()),
        config=config,
        dist_init_required=False,
    )
    return engine


class Nothing(nn.Module):
    """A zero loss of all parameters: what an engine can run backward, with nothing in it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self) -> Tensor:
        return torch.stack([(parameter * 0.0).sum() for parameter in self.held]).sum()


class ZeroOptimizer(Optimizer):
    """An optimizer whose state of the shared parameters is spread over the ranks by ZeRO (stage 0, 1 or 2).

    The parameters themselves are whole on every rank. A step takes their ``.grad``, which is the combination of the
    tasks' rows and the same on every rank already, and puts it in the place of the gradient of an engine's backward of
    nothing: each row is computed once, and none of DeepSpeed's averaging or accumulation applies. Private parameters
    have an optimizer of their own: the engine's flat buffers would turn the missing gradient of an absent task into
    zeros, and Adam would move its parameters.

    Args:
        make: Makes the optimizer of a list of parameters.
        layout: Which parameters are shared.
        distributed: The run's ranks.
        stage: Of ZeRO: 1 spreads the optimizer's state, 2 the gradients in it too, 0 nothing.

    Raises:
        UserError: DeepSpeed is not installed, there is nothing to spread, or the optimizer has several groups.
    """

    def __init__(
        self,
        make: Callable[[list[nn.Parameter]], Optimizer],
        layout: AdapterLayout,
        distributed: Distributed,
        *,
        stage: int,
    ) -> None:
        self._layout = layout
        self._stage = stage
        self._device = distributed.device
        self._shared = layout.shared_parameters()
        shared = set(self._shared)
        self._private = [parameter for parameter in layout.parameters() if parameter not in shared]
        if not self._shared:
            raise UserError(
                f"launch.sharding=zero{stage}: spreads the optimizer of what tasks share, and this layout shares "
                "nothing. Take launch.sharding=zero3 or none."
            )
        self.inner = make(self._shared)
        self._plain = make(self._private) if self._private else None
        optimizers = [self.inner, *([self._plain] if self._plain else [])]
        if any(len(optimizer.param_groups) != 1 for optimizer in optimizers):
            raise UserError(f"launch.sharding=zero{stage}: takes an optimizer with one group of parameters only.")
        self._engine = engine_of(Nothing(self._shared), self.inner, distributed, stage=stage)
        # The very groups of both, so that a scheduler sets the learning rates of both.
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.defaults = self.inner.defaults
        self.state = self.inner.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ANN401
        """Steps both optimizers with the gradients in ``.grad``."""
        private = [(parameter, parameter.grad) for parameter in self._private]
        self._step_shared([parameter.grad for parameter in self._shared])
        for parameter, gradient in private:
            parameter.grad = gradient
        if self._plain:
            self._plain.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients."""
        self._engine.zero_grad()
        for parameter in self._layout.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """As of a plain optimizer of ``layout.parameters()``, and ``master`` parameters if those are bfloat16.

        A collective: every rank must ask.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(self._shared):
            entry = self._entry(parameter)
            if entry and self._spread:
                entry = {
                    key: safe_get_full_optimizer_state(parameter, key).clone() if is_moment(value) else value.clone()
                    for key, value in entry.items()
                }
                if parameter.dtype != torch.float32:
                    entry[MASTER] = safe_get_full_fp32_param(parameter).clone()
            if entry:  # none before the first step
                state[index] = dict(entry)
        for index, parameter in enumerate(self._private, start=len(self._shared)):
            assert self._plain is not None
            if parameter in self._plain.state:
                state[index] = dict(self._plain.state[parameter])
        group = {key: value for key, value in self.inner.param_groups[0].items() if key != "params"}
        return {
            "state": state,
            "param_groups": [{**group, "params": list(range(len(self._shared) + len(self._private)))}],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a plain optimizer of ``layout.parameters()``."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        saved = state_dict["state"]
        [group] = state_dict["param_groups"]
        settings = {key: value for key, value in group.items() if key != "params"}
        if any(index in saved for index in range(len(self._shared))):
            for own in self.param_groups:
                own.update({**settings, "lr": 0.0})
            self._step_shared([torch.zeros_like(parameter) for parameter in self._shared])  # makes the state's buffers
        for own in self.param_groups:
            own.update(settings)
        for index, parameter in enumerate(self._shared):
            own_entry = self._entry(parameter)
            for key, value in saved.get(index, {}).items():
                if key == MASTER:
                    # Plain training carries it along unchanged; then it is not what the parameter is rounded from.
                    master = value.to(self._device)
                    current = master.to(parameter.dtype) == parameter
                    safe_set_full_fp32_param(parameter, torch.where(current, master, parameter.detach().float()))
                elif self._spread and is_moment(own_entry[key]):
                    safe_set_full_optimizer_state(parameter, value.to(self._device), key)
                else:
                    own_entry[key].copy_(value)
        if self._plain:
            first = len(self._shared)
            entries = {index - first: entry for index, entry in saved.items() if index >= first}
            plain = self._plain.state_dict()["param_groups"]
            self._plain.load_state_dict({"state": entries, "param_groups": [{**plain[0], **settings}]})

    def close(self) -> None:
        """Takes the engine's hooks off the parameters."""
        self._engine.destroy()
        # Its finalizer would do so again, whenever it is collected: to the next engine of these parameters.
        self._engine.optimizer = None

    @property
    def _spread(self) -> bool:
        return self._stage > 0

    def _entry(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The inner optimizer's state of a shared parameter; if spread, of this rank's part of all of them."""
        entry: dict[str, Any] = self.inner.state.get(parameter, {})
        return next(iter(self.inner.state.values()), {}) if self._spread else entry

    def _step_shared(self, gradients: list[Tensor | None]) -> None:
        from deepspeed.utils import safe_set_full_grad

        for parameter in self._layout.parameters():
            parameter.grad = None
        self._engine.backward(self._engine())
        for parameter, gradient in zip(self._shared, gradients, strict=True):
            safe_set_full_grad(parameter, gradient)
        self._engine.step()


def is_moment(value: Tensor) -> bool:
    """Whether a value of an optimizer's state is one for each element; else it counts steps, say."""
    return value.numel() > 1
