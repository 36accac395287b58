"""The one way a loss is computed: logits at target positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.data.batching import MicroBatch, stack
from mtl.data.tokenized import TokenizedExample
from mtl.models.attention import knows_lengths


def target_nll(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Negative log-likelihood of every target token of a micro-batch [nats], in the order of ``labels``."""
    return F.cross_entropy(target_logits(model, micro_batch), micro_batch.labels, reduction="none")


def target_logits(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Logits [targets, V] for every target token of a micro-batch, in the order of ``labels``.

    The vocabulary projection runs at target positions only (``logits_to_keep``). ``use_cache=False`` matters: with a
    cache transformers ignores packing silently. So does the missing attention mask, see :class:`MicroBatch`.
    """
    lengths: dict[str, Any] = {}
    if micro_batch.boundaries is not None and knows_lengths(model):
        longest = int(micro_batch.boundaries.diff().max())
        lengths = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), micro_batch.boundaries)
        lengths |= dict.fromkeys(("max_length_q", "max_length_k"), longest)
    logits: Tensor = model(
        input_ids=micro_batch.input_ids_BS,
        position_ids=micro_batch.position_ids_BS,
        use_cache=False,
        logits_to_keep=micro_batch.keep_BS,
        **lengths,
    ).logits
    return full_precision(logits.view(-1, logits.shape[-1]))


def full_precision(logits: Tensor) -> Tensor:
    """Logits in at least float32; float64 stays as it is, which ``.float()`` would throw digits of away."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


@torch.no_grad()
def packing_is_exact(model: nn.Module) -> bool:
    """Whether the model keeps packed examples apart: it compares the losses of two examples packed and alone.

    Models with recurrent layers, and attention code that ignores ``position_ids``, let neighbours leak.
    """
    device = next(model.parameters()).device
    examples = [(0, example) for example in probe_examples(model)]
    with evaluation_mode(model):
        packed = target_nll(model, stack([examples]).to(device))
        alone = torch.cat([target_nll(model, stack([[example]]).to(device)) for example in examples])
    return bool(torch.allclose(packed, alone, rtol=2e-2 if packed.dtype != torch.float64 else 1e-9, atol=1e-3))


def probe_examples(model: nn.Module) -> list[TokenizedExample]:
    """Two short examples of random tokens, to see how the model treats examples."""
    vocab_size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab_size, (length,), generator=generator).numpy().astype("int32") for length in (7, 5)]
    return [TokenizedExample(tokens, tokens >= 0) for tokens in ids]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches dropout off until the block ends."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
