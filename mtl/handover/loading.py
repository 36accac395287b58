"""A deployment in memory: the model with the adapter of one task at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from mtl.distributed import Distributed, forget_accelerator
from mtl.errors import UserError
from mtl.evaluation.batches import evaluating
from mtl.handover.deployment import Deployment
from mtl.job import accelerator_of
from mtl.models.load import load_model, load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel


class LoadedModel:
    """The model of a deployment, on the device and in the precision that the run was evaluated in.

    Only the adapter of the last task used is kept, so that a thousand tasks take the memory of one.

    Args:
        deployment: What to load.
        distributed: Its one process.

    Raises:
        UserError: Model or tokenizer can't be loaded.
    """

    def __init__(self, deployment: Deployment, distributed: Distributed) -> None:
        self.deployment = deployment
        self.distributed = distributed
        self.tokenizer: Any = load_tokenizer(deployment.tokenizer, deployment.cache_dir)
        self.model: Any = distributed.place(load_model(deployment.model, deployment.cache_dir), [])
        self._peft_model: PeftModel | None = None
        self._adapter: Path | None = None
        self._num_loaded = 0

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """The model of a task, in evaluation mode, until the block ends."""
        self._take(self.deployment.tasks[name].adapter)
        with evaluating(self.model):
            yield

    def _take(self, adapter: Path | None) -> None:
        if adapter == self._adapter:
            return
        assert adapter is not None, "all tasks have adapters, or none has"
        before, name = f"adapter{self._num_loaded}", f"adapter{self._num_loaded + 1}"
        peft_model = add_adapter(self._peft_model or self.model, adapter, name)
        peft_model.set_adapter(name)
        if self._peft_model is not None:
            peft_model.delete_adapter(before)
        self._peft_model, self._adapter = peft_model, adapter
        self._num_loaded += 1


@contextmanager
def opened(deployment: Deployment) -> Iterator[LoadedModel]:
    """Loads a deployment, and lets go of the device afterwards."""
    accelerator = accelerator_of(deployment.options.mixed_precision, use_cpu=deployment.options.use_cpu)
    try:
        yield LoadedModel(deployment, Distributed(accelerator))
    finally:
        accelerator.end_training()
        forget_accelerator()


def add_adapter(model: nn.Module, folder: Path, name: str) -> PeftModel:
    """Loads an adapter by peft onto a model, or beside the adapters that a peft model has.

    Raises:
        UserError: The folder can't be read, or doesn't fit the model.
    """
    from peft import PeftModel

    # peft draws initial values, which the file's then replace: whoever samples afterwards must not notice.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by an old name whether gradient checkpointing is on.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # and sets it itself
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # said below
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)  # merging unties them
        try:
            if isinstance(model, PeftModel):
                peft_model = model
            else:
                peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            missing = peft_model.load_adapter(str(folder), name).missing_keys
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise _misfit(folder, str(error).strip().splitlines()[0]) from error
    if missing:
        raise _misfit(folder, f"it lacks {len(missing)} weights, {missing[0]} first")
    return peft_model


def _misfit(folder: Path, found: str) -> UserError:
    return UserError(
        f"{folder}: this adapter can't be put onto the model ({found.rstrip('.')}). Is it the run's model?"
    )


def logits_of(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of every position, without a cache."""
    with evaluating(model):
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits
