"""Runs of ``mtl`` as a user would start them, and the examples that they see, for the variants without ``mtl``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.measuring import Setup

MAX_LENGTH = 512
LEARNING_RATE = 2e-4
ON_CPU = ("model.dtype=float32", "mixed_precision=no", "use_cpu=true", f"max_length={MAX_LENGTH}")
SHARED_LORA = (*ON_CPU, "adapters=shared", "adapters.lora_r=8", "adapters.lora_alpha=16", "adapters.lora_dropout=0")
PRIVATE_LORA = (
    *(*ON_CPU, "adapters=per_task", "adapters.private_lora_r=8", "adapters.private_lora_alpha=16"),
    "adapters.lora_dropout=0",
)


class Example(TypedDict):
    """A tokenized example; ``is_target`` marks the answer through its end of turn."""

    task: int
    input_ids: list[int]
    is_target: list[bool]


class Question(TypedDict):
    """A prompt of a task's test set, with the tokens of the options where there are any."""

    prompt: list[int]
    options: list[list[int]]


def make_run(setup: Setup, overrides: Sequence[str], configs: str | None = None) -> tuple[Any, Any]:
    """A run and its first stage, up to where ``mtl train`` would take the first step.

    What the model's losses are before training decides nothing here, so they are not computed.

    Args:
        setup: Names model and seed.
        overrides: Of the config, beside what all runs share.
        configs: Folder of more configs.
    """
    from mtl.composition import composed, parsable, settings_of
    from mtl.distributed import Distributed
    from mtl.interrupt import StopSignal
    from mtl.job import make_accelerator
    from mtl.prepare import prepare
    from mtl.training import begin_stage

    common = [
        *(f"model.name_or_path={setup.model}", f"seed={setup.seed}", f"learning_rate={LEARNING_RATE}"),
        *("too_long=drop", "max_steps=1000", "evals_per_stage=1"),
    ]
    config = composed([parsable(override) for override in (*common, *overrides)], configs)
    settings = settings_of(config, Path(tempfile.mkdtemp(dir=setup.folder)) / "run")
    run = prepare(settings, Distributed(make_accelerator(settings)), StopSignal()).run
    run.state.base_validation_T = run.state.validation_T = [{"loss": 1.0} for _ in run.data]
    return run, begin_stage(run)


def write_steps(setup: Setup, overrides: Sequence[str], num_steps: int) -> str:
    """Writes the examples that a run's first steps draw; returns the file."""
    from mtl.step import draw_batch

    run, parts = make_run(setup, overrides)
    batches = [draw_batch(run, parts, parts.sampler.counts(parts.batch_size))[0] for _ in range(num_steps)]
    steps = [
        [
            Example(task=task, input_ids=example.input_ids.tolist(), is_target=example.is_target.tolist())
            for task, example in batch.examples
        ]
        for batch in batches
    ]
    return _write(setup, steps)


def write_questions(setup: Setup, overrides: Sequence[str], scoring: str) -> str:
    """Writes the test questions of the tasks that are scored so, of each as many as are evaluated."""
    from mtl.evaluation.evaluate import select_examples

    run, _ = make_run(setup, overrides)
    questions = [
        [
            Question(prompt=list(example.prompt_ids), options=[list(option) for option in example.option_ids or ()])
            for example in select_examples(data, "test", setup.eval_examples)
        ]
        for data in run.data
        if data.task.scoring == scoring
    ]
    return _write(setup, questions)


def read_examples(setup: Setup) -> Any:  # noqa: ANN401 - lists of what was written
    """The examples of all steps, or the questions of all tasks."""
    return json.loads(Path(setup.examples).read_text(encoding="utf-8"))


def counts(examples: Sequence[Example]) -> dict[str, float]:
    """What a step over these examples has to report."""
    return {
        "num_examples": len(examples),
        "num_tokens": sum(len(example["input_ids"]) for example in examples),
        "num_targets": sum(sum(example["is_target"]) for example in examples),
    }


def _write(setup: Setup, content: object) -> str:
    with tempfile.NamedTemporaryFile("w", dir=setup.folder, suffix=".json", delete=False, encoding="utf-8") as file:
        json.dump(content, file)
    return file.name
