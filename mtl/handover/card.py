"""The README.md of an export: what it is, of what it was made, how good it is, how to load it."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mtl.handover.deployment import Deployment
from mtl.models.load import PACKAGE_PREFIX, ModelSettings
from mtl.reporting.results import Results, TaskResult


@dataclass(frozen=True)
class Card:
    """What a card says beside what the deployment knows.

    Args:
        name: Of the export.
        kind: Its format.
        tasks: What it is for.
        dtype: Of merged weights.
        results: The run's.
        notes: Sentences on how it was made, such as what a combination leaves out.
        checked: What was checked for llama.cpp.
        unchecked: What could not be.
    """

    name: str
    kind: str
    tasks: Sequence[str]
    dtype: str
    results: Results
    notes: Sequence[str] = ()
    checked: Sequence[str] = ()
    unchecked: Sequence[str] = ()


def card_text(card: Card, deployment: Deployment) -> str:
    """The card as Markdown, with the head that model hubs read."""
    sections = [
        _head(card, deployment),
        f"# {card.name}",
        _summary(card, deployment),
        "## How to load it",
        _loading(card, deployment),
        "## How good it is",
        _scores(card),
        "## Data",
        _data(card, deployment),
        "## Training",
        _training(card, deployment),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def base_licence(base: ModelSettings) -> str | None:
    """The licence that the base model's package or folder states; of a hub id, its page does."""
    if base.name_or_path.startswith(PACKAGE_PREFIX):
        package = importlib.metadata.metadata(base.name_or_path.removeprefix(PACKAGE_PREFIX))
        return next((package[key] for key in ("License-Expression", "License") if key in package), None)
    readme = Path(base.name_or_path).expanduser() / "README.md"
    if readme.is_file():
        head = re.match(r"---\n(.*?)\n---\n", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        found = re.search(r"^license:\s*(\S+)", head[1], re.MULTILINE) if head else None
        return found[1] if found else None
    return None


def _head(card: Card, deployment: Deployment) -> str:
    base, licence = deployment.base.name_or_path, base_licence(deployment.base)
    lines = ["---", f"library_name: {'peft' if card.kind == 'adapter' else 'transformers'}"]
    if _is_hub_id(base):
        lines.append(f"base_model: {base}")
    if licence is not None and re.fullmatch(r"[\w.-]+", licence):
        lines.append(f"license: {licence.lower()}")
    return "\n".join([*lines, "pipeline_tag: text-generation", "tags: [mtl, multi-task]", "---"])


def _summary(card: Card, deployment: Deployment) -> str:
    parts = "all of its parameters" if deployment.base != deployment.model else "base model and adapter in one"
    what = {
        "adapter": "A LoRA adapter (PEFT)",
        "merged": f"A whole model ({card.dtype}), {parts},",
        "gguf-ready": f"A whole model ({card.dtype}), {parts}, prepared for conversion to GGUF,",
    }[card.kind]
    tasks = ", ".join(f"`{name}`" for name in card.tasks)
    licence = base_licence(deployment.base) or "not known here; see where the model comes from"
    lines = [
        f"{what} for the task{'s' if len(card.tasks) > 1 else ''} {tasks}, trained by `mtl` together with the other "
        "tasks below.",
        "",
        f"- Base model: `{deployment.base.name_or_path}`"
        + (f", revision `{deployment.base.revision}`" if deployment.base.revision else ""),
        f"- Its licence: {licence}",
        *(f"- {note}" for note in card.notes),
    ]
    if _gguf_of(deployment.base):
        lines.append("- The base model is a quantized GGUF, made dense again; its scores are not the original's.")
    for name in card.tasks:
        task = deployment.tasks[name].task
        if task.labels:
            lines.append(f"- `{name}` chooses among {', '.join(f'`{label}`' for label in task.labels)}, by likelihood.")
        if task.system_prompt is not None:
            lines.append(f"- `{name}` has the system prompt {json.dumps(task.system_prompt, ensure_ascii=False)}.")
    return "\n".join(lines)


def _loading(card: Card, deployment: Deployment) -> str:
    name = card.tasks[0]
    system_prompt = deployment.tasks[name].task.system_prompt
    messages = [] if system_prompt is None else [f'{{"role": "system", "content": {_text(system_prompt)}}}']
    messages.append('{"role": "user", "content": "..."}')
    is_adapter = card.kind == "adapter"
    from_gguf = is_adapter and _gguf_of(deployment.base)
    classes = ["AutoModelForCausalLM", "AutoTokenizer"]
    classes += ["GenerationConfig"] * is_adapter + ["GgufConfig"] * from_gguf
    code = [
        *(["import os", "from importlib.metadata import files", ""] if from_gguf else []),
        *(["from peft import PeftModel"] if is_adapter else []),
        f"from transformers import {', '.join(classes)}",
        "",
        'folder = "."  # this one',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if is_adapter:
        code += [
            *_load_base(deployment.base),
            "model = PeftModel.from_pretrained(base, folder)",
            "model.generation_config = GenerationConfig.from_pretrained(folder)",
        ]
    else:
        code.append("model = AutoModelForCausalLM.from_pretrained(folder)")
    code += [
        f"messages = [{', '.join(messages)}]",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        'answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    parts = ["```python\n" + "\n".join(code) + "\n```"]
    if is_adapter:
        parts.append(
            'Several adapters on one base model: `model.load_adapter(other_folder, adapter_name="other")`, then\n'
            '`model.generate(**inputs, adapter_names=["default", "other"])` gives each row of a batch its own (not for '
            "DoRA);\npad such a batch on the left."
        )
    if card.kind == "gguf-ready":
        parts.append(_conversion(card))
    parts.append("With `mtl`: `mtl eval FOLDER`, `mtl predict FOLDER --input FILE`, `mtl chat FOLDER`.")
    return "\n\n".join(parts)


def _conversion(card: Card) -> str:
    kind = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[card.dtype]
    return "\n".join(
        [
            "To GGUF, with a checkout of llama.cpp and what its converter asks for (`pip install -r "
            "requirements/requirements-convert_hf_to_gguf.txt`):",
            "",
            "```",
            f"python convert_hf_to_gguf.py FOLDER --outfile model-{kind}.gguf --outtype {kind}",
            f"llama-quantize model-{kind}.gguf model-Q4_K_M.gguf Q4_K_M",
            "```",
            "",
            "Checked when this folder was written:",
            "",
            *(f"- {clause}" for clause in card.checked),
            "",
            "Not checked:",
            "",
            *(f"- {clause}" for clause in card.unchecked),
        ]
    )


def _load_base(base: ModelSettings) -> list[str]:
    if not _gguf_of(base):
        revision = f", revision={_text(base.revision)}" if base.revision else ""
        return [f"base = AutoModelForCausalLM.from_pretrained({_text(base.name_or_path)}{revision})"]
    if base.name_or_path.startswith(PACKAGE_PREFIX):
        package = _text(base.name_or_path.removeprefix(PACKAGE_PREFIX))
        path = f'str(next(file.locate() for file in files({package}) if file.suffix == ".gguf"))'
    else:
        path = _text(base.name_or_path)
    return [
        f"gguf = {path}",
        "base = AutoModelForCausalLM.from_pretrained(",
        '    os.path.dirname(gguf), gguf_file=os.path.basename(gguf), dtype="float32",',
        "    quantization_config=GgufConfig(dequantize=True),",
        ")",
    ]


def _scores(card: Card) -> str:
    lines = [
        "On test data, before and after the run (the adapters of the run, each on its own task); scores are in [0, 1],",
        "losses in nats per token of the answer.",
        "",
        "| task | metric | before | after | loss before | loss after | test examples | examples seen | epochs seen |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, task in card.results.tasks.items():
        shown = f"**{name}**" if name in card.tasks else name
        numbers = [_score(task, task.base), _score(task, task.test), task.base.get("loss"), task.test.get("loss")]
        cells = [shown, task.metric or "-", *map(_number, numbers), f"{task.test.get('num_examples') or 0:.0f}"]
        lines.append(
            f"| {' | '.join(_cell(cell) for cell in cells)} | {task.examples_seen:,} | {task.epochs_seen:.2f} |"
        )
    return "\n".join(lines)


def _data(card: Card, deployment: Deployment) -> str:
    manifest = json.loads((Path(str(resources.files("mtl.tasks"))) / "suite" / "manifest.json").read_text("utf-8"))
    lines = ["| task | source | licence |", "|---|---|---|"]
    for name, deployed in deployment.tasks.items():
        scheme, _, builtin = deployed.task.path.partition(":")
        facts = manifest["tasks"].get(builtin) if scheme == "builtin" else None
        source = facts["source"] if facts else f"`{deployed.task.path}`"
        licence = facts["licence"] if facts else "not known to `mtl`: to be stated by who hands this over"
        lines.append(f"| {_cell(name)} | {_cell(source)} | {_cell(licence)} |")
    return "\n".join(lines)


def _training(card: Card, deployment: Deployment) -> str:
    levers = ", ".join(f"{lever} `{option}`" for lever, option in deployment.strategy.items())
    cost = card.results.cost
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    return "\n".join(
        [
            f"- Strategy: {levers}; seed {deployment.seed}",
            f"- {cost.steps:,} steps, {cost.tokens:,} tokens ({cost.target_tokens:,} of them trained on)",
            f"- Exported with {versions}",
        ]
    )


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _gguf_of(base: ModelSettings) -> bool:
    return base.name_or_path.startswith(PACKAGE_PREFIX) or base.name_or_path.endswith(".gguf")


def _score(task: TaskResult, values: Mapping[str, Any]) -> float | None:
    return None if task.metric is None else values.get(task.metric)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _text(value: str) -> str:
    """A Python literal."""
    return json.dumps(value, ensure_ascii=False)
