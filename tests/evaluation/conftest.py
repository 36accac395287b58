"""Tiny random models in float64, a byte-level tokenizer, and tasks made of them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mtl.data.loading import EvalExample, TaskData
from mtl.data.tokenized import TokenizedExample
from mtl.tasks.task import Task

SPECIAL = ["<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB_SIZE = 256 + len(SPECIAL)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB_SIZE}
CONFIGS = {
    "llama": LlamaConfig(intermediate_size=48, num_key_value_heads=2, initializer_range=0.4, **SMALL),
    # A window shorter than the prompts.
    "mistral": MistralConfig(
        intermediate_size=48, num_key_value_heads=2, sliding_window=9, initializer_range=0.4, **SMALL
    ),
    # A window that everything fits in, in one of the layers.
    "qwen2": Qwen2Config(
        intermediate_size=48,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=200,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.4,
        **SMALL,
    ),
    # A convolution with a state, and an attention layer.
    "lfm2": Lfm2Config(
        intermediate_size=48,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.4,
        **SMALL,
    ),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB_SIZE, initializer_range=0.4, bos_token_id=1, eos_token_id=1
    ),
}


@pytest.fixture(scope="session")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    assert len(tokenizer) == VOCAB_SIZE
    return tokenizer


# ALiBi counts positions in the cache. Not among the others: transformers' eager attention gives NaN in float64 where a
# row begins with padding.
ALIBI = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCAB_SIZE, initializer_range=0.4)


def build(kind: str, dtype: torch.dtype = torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(ALIBI if kind == "mpt" else CONFIGS[kind]).to(dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="session")
def build_model():
    return build


@pytest.fixture
def watch(monkeypatch):
    """Notes the shape of what each forward of a model reads."""

    def watch(model):
        shapes = []
        forward = model.forward
        noting = lambda **inputs: shapes.append(tuple(inputs["input_ids"].shape)) or forward(**inputs)  # noqa: E731
        monkeypatch.setattr(model, "forward", noting)
        return shapes

    return watch


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture(params=sorted(CONFIGS))
def any_model(request):
    return build(request.param)


@pytest.fixture(scope="session")
def encode(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="session")
def make_data(encode):
    """Builds a task from rows of (prompt, answer, options or None)."""

    def make(rows, *, majority=None, fingerprint="f", **fields):
        task = Task(**({"name": "toy", "path": "toy", "metric": "chrf", "scoring": "generation"} | fields))
        examples = []
        for number, (prompt, answer, options) in enumerate(rows, 1):
            prompt_ids = encode(f"<|user|>{prompt}<|end|><|assistant|>")
            answer_ids = encode(f"{answer}<|end|>")
            tokens = TokenizedExample(
                np.array(prompt_ids + answer_ids, dtype=np.int32),
                np.array([False] * len(prompt_ids) + [True] * len(answer_ids)),
            )
            option_ids = None if options is None else tuple(tuple(encode(f"{option}<|end|>")) for option in options)
            examples.append(
                EvalExample(tokens, prompt, tuple(prompt_ids), answer, options, option_ids, f"val.jsonl:{number}")
            )
        return TaskData(
            task=task,
            train=[],
            train_locations=[],
            val=examples,
            test=examples[::-1],
            majority=majority,
            num_dropped=0,
            fingerprint=fingerprint,
        )

    return make


ROWS = [
    ("Where is Oslo?", "Norway", None),
    ("A", "b", None),
    ("翻译成英文：你好", "hello 👋", None),  # noqa: RUF001
    ("A rather longer prompt, so that there is padding", "oui", None),
    ("", "an answer much longer than the question was", None),
    ("x" * 30, "çà et là", None),
    ("tell me", "no", None),
]


@pytest.fixture(scope="session")
def rows():
    return ROWS


@pytest.fixture(scope="session")
def alone():
    """One process."""
    return SimpleNamespace(rank=0, world_size=1, sharded=False, gather=lambda value: [value])


@pytest.fixture(scope="session")
def no_adapters():
    return lambda task: nullcontext()
