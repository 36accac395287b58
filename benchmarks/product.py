"""``mtl``'s own training loop, its overhead, and its sampler's draw."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.examples import make_run
from benchmarks.measuring import Measurement, Setup


class Training:
    """Steps of the training loop, with all that belongs to one: drawing, logging, optimizer.

    Args:
        setup: What all variants share.
        overrides: Of the config.
        num_tasks: Train on so many small tasks made of the package's examples, instead of the package's tasks.
    """

    def __init__(self, setup: Setup, overrides: Sequence[str], num_tasks: int | None = None) -> None:
        self.setup = setup
        self.overrides = overrides
        self.num_tasks = num_tasks

    def prepare(self) -> None:
        configs = None
        overrides = list(self.overrides)
        if self.num_tasks is not None:
            configs = str(write_small_tasks(Path(self.setup.folder), self.num_tasks))
            overrides.append("tasks=small")
        self.run, self.parts = make_run(self.setup, overrides, configs)

    def step(self, index: int) -> Measurement:
        from mtl.training import train

        state = self.run.state
        before = sum(state.examples_seen_T), state.tokens, sum(state.target_tokens_T)
        self.parts.num_steps = state.stage_step + 1  # the loop goes as far as that
        # Training mode is set once a stage, not once a step.
        with mock.patch.object(self.run.model, "train") if index else nullcontext():
            train(self.run, self.parts)
        after = sum(state.examples_seen_T), state.tokens, sum(state.target_tokens_T)
        names = ("num_examples", "num_tokens", "num_targets")
        return {name: new - old for name, old, new in zip(names, before, after, strict=True)}


class Overhead(Training):
    """The share of a step that is neither forward nor backward."""

    def step(self, index: int) -> Measurement:
        start = time.perf_counter()
        with timed_passes() as passes:
            counted = super().step(index)
        seconds = time.perf_counter() - start
        last = json.loads((self.run.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return {
            **counted,
            "num_present": len(last["loss"]),
            "overhead_seconds": seconds - sum(passes),
            "overhead": 1 - sum(passes) / seconds,
        }


class Draw:
    """A sampler's decision how many examples of each task a step sees.

    Args:
        setup: What all variants share.
        num_tasks: T.
        num_examples: Of a step.
    """

    NUM_DRAWS = 20  # one is too short to be timed alone

    def __init__(self, setup: Setup, num_tasks: int, num_examples: int) -> None:
        self.seed = setup.seed
        self.num_tasks = num_tasks
        self.num_examples = num_examples

    def prepare(self) -> None:
        from mtl.samplers import Temperature

        sizes = [100 + 37 * task % 1000 for task in range(self.num_tasks)]
        self.sampler = Temperature(sizes=sizes, temperature=2.0, seed=self.seed)

    def step(self, index: int) -> Measurement:
        start = time.perf_counter()
        for _ in range(self.NUM_DRAWS):
            self.sampler.counts(self.num_examples)
        return {"seconds": (time.perf_counter() - start) / self.NUM_DRAWS}


@contextmanager
def timed_passes() -> Iterator[list[float]]:
    """Collects the seconds of every forward (with its loss) and backward of ``mtl`` within the block."""
    import torch

    import mtl.gradients

    passes: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> Any:  # noqa: ANN401
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                passes.append(time.perf_counter() - start)

        return call

    with ExitStack() as stack:
        for owner, name in ((mtl.gradients, "target_nll"), (torch.Tensor, "backward"), (torch.autograd, "grad")):
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield passes


def write_small_tasks(folder: Path, num_tasks: int) -> Path:
    """Deals the package's examples out to many small tasks; returns the folder of their config ``tasks=small``."""
    import mtl

    names = ["sentiment", "sarcasm", "quartz", "ner_finance", "translate_en_fr", "inflect", "g2p", "text2sql"]
    suite = Path(mtl.__file__).parent / "tasks" / "suite"
    lines = {
        name: cycle(row for row in (suite / name / "train.jsonl").read_text("utf-8").splitlines() if len(row) < 400)
        for name in names
    }
    tasks = {}
    for task in range(num_tasks):
        place = folder / "small" / f"task{task:04}"
        place.mkdir(parents=True)
        rows = lines[names[task % len(names)]]
        for split, size in (("train", 4 + task % 13), ("val", 1), ("test", 1)):
            text = "\n".join(islice(rows, size)) + "\n"
            (place / f"{split}.jsonl").write_text(text, encoding="utf-8")
        tasks[place.name] = {"path": str(place), "format": "prompt_completion", "metric": "none"}
    configs = folder / "configs"
    (configs / "tasks").mkdir(parents=True)
    (configs / "tasks" / "small.yaml").write_text(json.dumps(tasks), encoding="utf-8")  # JSON is YAML
    return configs
