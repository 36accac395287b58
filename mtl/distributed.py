"""Every collective of the library.

Data parallelism here needs no wrapper around the model: each rank runs its slice of the step, and the tasks' gradients
are summed once, while they are still apart. A launch with FSDP2 also shards the parameters that would weigh too much
on every rank: each then holds a part of them, and every forward and backward is a collective. On one process every
method is a no-op.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mtl.errors import UserError

ZERO_STAGE = "MTL_ZERO_STAGE"  # in the environment of a rank: DeepSpeed's, where the launch asks for it


class Distributed:
    """The ranks of a run, and what they tell each other.

    ``sharded`` says whether parameters are spread over the ranks (FSDP2, or DeepSpeed's stage 3). Every rank must then
    run as many forwards and backwards as every other. ``hooks_gradients`` says whether a plain backward would be
    intercepted (DeepSpeed's other stages).

    Args:
        accelerator: The run's accelerator; it owns the process group.

    Raises:
        UserError: The launch asks for FSDP of version 1.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        several = self.world_size > 1
        self.fsdp: bool = fsdp_requested() and several
        self.zero_stage: int | None = int(os.environ[ZERO_STAGE]) if ZERO_STAGE in os.environ else None
        self.sharded: bool = self.fsdp or (self.zero_stage == 3 and several)
        self.hooks_gradients: bool = self.zero_stage in (0, 1, 2)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def seed_dropout(self, seed: int) -> None:
        """Seeds the generator that dropout on the run's device draws from; ``torch.manual_seed`` asks every backend."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def place(self, model: nn.Module, trainable: Sequence[nn.Parameter]) -> nn.Module:
        """The model on the run's device and in its precision, sharded if the launch asks for it.

        Where only a part of the model is trained, that part is small: it stays whole on every rank, as the parameters
        that it was. Where all of it is trained, all of it is sharded, and the model's parameters are replaced.

        Args:
            model: On the CPU, the same on every rank.
            trainable: Its parameters that are trained.
        """
        # Autocast and device only: accelerate's own wrappers would reduce gradients before the tasks are told apart.
        placed: nn.Module = self.accelerator.prepare_model(
            model, device_placement=not self.sharded, evaluation_mode=True
        )
        if self.fsdp:
            everything = all(parameter.requires_grad for parameter in placed.parameters())
            self._shard(placed, replicated=set() if everything else set(trainable))
        return placed

    def _shard(self, model: nn.Module, replicated: set[nn.Parameter]) -> None:
        # Autocast alone would keep a bfloat16 copy of every gathered weight until the backward: gather that instead.
        half = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for module in reversed([model, *decoder_layers(model)]):  # inner ones first
            sharded = fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=True,  # also of the root, whose parameters would stay whole after an evaluation
                mp_policy=policy,
                ignored_params=replicated,
            )
            sharded.set_gradient_divide_factor(1.0)  # a sum: the losses have the whole step's denominators
            sharded.set_force_sum_reduction_for_comms(True)
        for parameter in replicated:
            parameter.data = parameter.data.to(self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces ``tensor`` by its sum over ranks; every rank gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors by those of rank 0; shards, which differ by nature, stay."""
        if self.world_size > 1:
            for tensor in tensors:
                if not is_shard(tensor):
                    dist.broadcast(tensor, src=0)

    def broadcast_object(self, value: Any) -> Any:  # noqa: ANN401
        """The value of rank 0, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401
        """Every rank's value on every rank, in rank order."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def largest(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.accelerator.wait_for_everyone()

    def check_identical(self, tensors: Iterable[Tensor], what: str) -> None:
        """Stops the run if the ranks' tensors differ in a single bit; shards, which differ by nature, are passed by.

        Raises:
            RuntimeError: Names the ranks that differ from rank 0.
        """
        digests = self.gather(checksum(tensor for tensor in tensors if not is_shard(tensor)))
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise RuntimeError(f"{what} differ between rank 0 and ranks {odd}: the ranks have drifted apart.")


def checksum(tensors: Iterable[Tensor]) -> str:
    """sha256 over the bytes of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_shard(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; all of it unless it is sharded."""
    return tensor.detach().to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank. A collective if it is sharded: every rank must ask."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, spread over the ranks as ``reference`` is; as it is if that is not sharded. No communication."""
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(reference.device), reference.device_mesh, reference.placements, src_data_rank=None
    )


def whole_state(value: Any, *, keep: bool) -> Any:  # noqa: ANN401
    """Nested state with every sharded tensor whole, on the CPU. A collective: every rank must ask for the same state.

    Args:
        value: Dicts and lists of plain values and tensors.
        keep: Whether this rank wants the answer; otherwise it gets ``None`` for sharded tensors and no memory is held.
    """
    if isinstance(value, DTensor):
        full = whole(value.detach())
        return full.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole_state(item, keep=keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole_state(item, keep=keep) for item in value)
    return value


def as_shard(part: Tensor, reference: Tensor) -> Tensor:
    """This rank's part of a tensor that is spread like ``reference``, sharing memory; ``part`` if that is whole."""
    if not isinstance(reference, DTensor):
        return part
    return DTensor.from_local(
        part,
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=reference.stride(),
    )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, outer ones first: as transformers names them, else those of the largest list."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return layers or list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=()))


def fsdp_requested() -> bool:
    """Whether the launch asks for FSDP2. accelerate knows too, except on CPUs.

    Raises:
        UserError: It asks for version 1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"The launch asks for FSDP version {version}; it must be 2, which can leave some parameters whole. Launch "
            "with --fsdp_version 2."
        )
    # Otherwise transformers leaves the weights of all ranks but one empty, for accelerate's wrapper to fill.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return True


def lost_connection(error: BaseException) -> bool:
    """Whether an error is, or comes of, a collective whose peer is gone: a consequence, not the cause of trouble."""
    cause: BaseException | None = error
    while cause is not None:
        # gloo has no exception type of its own; its messages begin with the file they come from.
        if isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and "gloo/" in str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def forget_accelerator() -> None:
    """Lets the next run in this process choose its precision and device anew; accelerate keeps those of the first."""
    AcceleratorState._reset_state(reset_partial_state=True)
