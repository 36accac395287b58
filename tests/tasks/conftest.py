"""A tokenizer whose ids can be written down by hand: a byte is its own id, ``<s>`` is 256 and ``<e>`` is 257."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message.role + '\n' + message.content + '<e>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def byte_level_alphabet() -> list[str]:
    """The characters that byte-level tokenizers write the bytes 0 to 255 with."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    def make(chat_template: str | None = CHAT_TEMPLATE, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
        vocabulary = {character: byte for byte, character in enumerate(byte_level_alphabet())}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<s>", "<e>"])
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
        # pad is eos, as in many chat models: nothing may tell targets from padding by the id
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<e>", pad_token="<e>")
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def ids() -> Callable[[str], list[int]]:
    special = {"<s>": [256], "<e>": [257]}

    def encode(text: str) -> list[int]:
        return [id_ for part in re.split("(<s>|<e>)", text) for id_ in special.get(part, list(part.encode()))]

    return encode
