"""What an export holds beside weights: tokenizer, chat template, settings of the generation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl.data.tokenized import TokenizedExample
from mtl.evaluation.generation import stop_tokens
from mtl.handover.deployment import Deployment
from mtl.models.load import local_folder
from mtl.tasks.formats import Conversation, Message
from mtl.tasks.rendering import Renderer

if TYPE_CHECKING:
    from collections.abc import Sequence

# What a Renderer writes where a tokenizer has no template, for programs that know templates only.
PLAIN_TEMPLATE = (
    "{%% for message in messages %%}{%% if loop.first %%}%s{%% endif %%}{{ message['content'] }}"
    "{%% if message['role'] == 'assistant' %%}{{ eos_token }}{%% else %%}{{ '\\n' }}{%% endif %%}{%% endfor %%}"
)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:  # noqa: ANN401
    """Saves the tokenizer with a chat template, in a form that older versions of transformers read, too."""
    if tokenizer.chat_template is None:
        adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = PLAIN_TEMPLATE % ("{{ bos_token }}" if adds_bos else "")
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # version 4 has the class under this name only
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def generation_config(deployment: Deployment, tokenizer: Any, tasks: Iterable[str]) -> Any:  # noqa: ANN401
    """How the answers of the evaluation were generated: greedily, of the tasks' length, to the end of turn."""
    from transformers import AutoConfig, GenerationConfig

    folder = local_folder(deployment.base.name_or_path, deployment.cache_dir)
    try:
        own = GenerationConfig.from_pretrained(folder, revision=deployment.base.revision or "main")
    except OSError:  # not every model has a file of its own
        own = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=deployment.base.trust_remote_code)
        )
    stops = all_stops(own, tokenizer)
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max(deployment.tasks[name].task.max_new_tokens for name in tasks),
        bos_token_id=own.bos_token_id,
        eos_token_id=stops if len(stops) != 1 else stops[0],
        pad_token_id=tokenizer.pad_token_id,
    )


def all_stops(own: Any, tokenizer: Any) -> Sequence[int]:  # noqa: ANN401
    """Every token that ends an answer.

    Args:
        own: The model's generation settings.
        tokenizer: Its tokenizer; the chat template tells the end of turn.
    """
    turn = Conversation((Message("user", "a"), Message("assistant", "b")))
    renderer = Renderer(tokenizer, "")
    [answer] = renderer.tokenize([renderer.pieces(turn)[-1].text])
    example = TokenizedExample(np.array(answer, dtype=np.int32), np.ones(len(answer), dtype=np.bool_))
    model: Any = SimpleNamespace(generation_config=own)
    return sorted(stop_tokens(model, tokenizer, [example]))
