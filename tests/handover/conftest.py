"""Tiny runs of every layout, trained once, with the logits that the layouts gave when they were finished."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

COLOURS = [{"prompt": f"Is colour {i} warm?", "completion": ("warm", "cold")[i % 2]} for i in range(24)]
SUMS = [{"prompt": f"{i} + {i + 1}?", "completion": str(2 * i + 1)} for i in range(24)]
PICKS = [{"prompt": f"Pick {i}.", "completion": "abc"[i % 3], "options": ["a", "b", "c"]} for i in range(24)]
TASKS = {"colours": COLOURS, "sums": SUMS, "picks": PICKS}
SYSTEM_PROMPT = "Answer briefly."
PROMPTS = torch.randint(258, (50, 20), generator=torch.Generator().manual_seed(3))

RANKS = ["adapters.lora_r=3", "adapters.private_lora_r=2"]
LAYOUTS = {
    "shared": ["adapters=shared", "adapters.lora_r=3"],
    "per_task": ["adapters=per_task", "adapters.private_lora_r=3"],
    "shared_and_per_task": ["adapters=shared_and_per_task", *RANKS],
    "shared_a_per_task_b": ["adapters=shared_a_per_task_b", "adapters.lora_r=3"],
    "experts": ["adapters=experts", "adapters.num_experts=3", "adapters.lora_r=2"],
    "task_groups": [
        *("adapters=task_groups", "adapters.lora_r=3", "adapters.private_lora_r=1", "adapters.group_lora_r=2"),
        *("adapters.groups.first=[colours,sums]", "adapters.groups.second=[sums,picks]"),
    ],
    "dora": ["adapters=per_task", "adapters.use_dora=true", "adapters.private_lora_r=2"],
    "rslora": ["adapters=shared_and_per_task", "adapters.use_rslora=true", *RANKS],
    "full": ["adapters=full"],
}


@dataclass(frozen=True)
class Trained:
    """A finished run, and the logits of ``PROMPTS`` that its layout gave for each task."""

    folder: Path
    logits: dict[str, torch.Tensor]

    @property
    def results(self):
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))["tasks"]


@pytest.fixture(scope="session")
def handover_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(handover_cache, monkeypatch):
    monkeypatch.setenv("MTL_CACHE", str(handover_cache))


@pytest.fixture(scope="session")
def task_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_folder, task_files, handover_cache):
    """Trains a layout, once."""
    runs = {}

    def train(layout, *overrides):
        key = (layout, *overrides)
        if key not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MTL_CACHE", str(handover_cache))
                runs[key] = train_recorded(
                    patch, tmp_path_factory.mktemp("run"), tiny_folder, task_files, [*LAYOUTS[layout], *overrides]
                )
        return runs[key]

    return train


def train_recorded(patch, folder, model, task_files, overrides):
    from mtl import job
    from mtl.cli import main
    from mtl.handover.loading import logits_of

    finish, logits = job.finish, {}

    def recording(run, settings, base):
        finish(run, settings, base)
        for index, name in enumerate(run.names):
            with run.layout.activate(index):
                logits[name] = logits_of(run.model, PROMPTS)

    patch.setattr(job, "finish", recording)
    fixed = [
        *("tasks=none", *(f"tasks.{name}.path={task_files / name}.jsonl" for name in TASKS)),
        *("tasks.colours.labels=[warm,cold]", f"tasks.colours.system_prompt='{SYSTEM_PROMPT}'"),
        *("tasks.sums.metric=exact_match", "tasks.sums.max_new_tokens=3"),
        *(f"model.name_or_path={model}", f"output_dir={folder / 'run'}", "learning_rate=0.03", "max_steps=3"),
        *("batch_size=6", "evals_per_stage=1", "max_eval_examples=2", "eval_scores=false", "max_test_examples=5"),
        *(f"tasks.{name}.test_size=6" for name in TASKS),
    ]
    assert main(["train", *fixed, *overrides]) == 0
    return Trained(folder / "run", logits)


@pytest.fixture(scope="session")
def train_on():
    """Trains on another model."""
    return train_recorded


@pytest.fixture(scope="session")
def plain_logits():
    """Logits of ``PROMPTS`` from any model, by transformers alone."""

    def compute(model, **options):
        with torch.no_grad():
            return model.eval()(input_ids=PROMPTS, use_cache=False, **options).logits

    return compute


@pytest.fixture(scope="session")
def prompts():
    return PROMPTS


@pytest.fixture
def mtl(capsys):
    """Runs a command and gives what it printed."""
    from mtl.cli import main

    def run(*arguments, code=0):
        capsys.readouterr()  # of a training before
        found = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert found == code, shown.err
        return shown.out if code == 0 else shown.err

    return run
