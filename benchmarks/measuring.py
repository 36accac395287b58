"""Measures the variants of a comparison round by round, each in a process of its own."""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
MIN_ROUNDS = 3
SAME_WORK = ("num_tokens", "num_targets", "num_examples")

Measurement = dict[str, float]


class MeasurementError(Exception):
    """A variant could not be measured."""


@dataclass(frozen=True)
class Setup:
    """What all variants of a comparison share.

    Args:
        model: Folder of the model.
        seed: Of samplers, data order and adapters.
        threads: Of each process.
        rounds: At most so many are measured, after one that is not.
        seconds: No further round is begun once a comparison has taken so long, if it has three.
        eval_examples: Of each task in an evaluation.
        folder: For whatever a variant writes.
        examples: File with the examples of all rounds, for variants that do not draw them themselves.
    """

    model: str
    seed: int
    threads: int
    rounds: int
    seconds: float
    eval_examples: int
    folder: str
    examples: str = ""


@dataclass(frozen=True)
class Spec:
    """A class of this package by ``module.Class``, and what it is made with besides the setup."""

    target: str
    options: Mapping[str, Any]


class Variant(Protocol):
    """One way of doing a piece of work."""

    def prepare(self) -> None:
        """Does what is not measured."""

    def step(self, index: int) -> Measurement:
        """Does the work of a round; 0 is the warm-up.

        Returns:
            What it counted. ``seconds`` replaces the time the whole call took.
        """
        ...


class Runner(Protocol):
    """Where a variant runs."""

    def step(self, index: int) -> Measurement: ...


class InProcess:
    """A variant in this process, ready to be measured."""

    def __init__(self, spec: Spec, setup: Setup) -> None:
        module, _, name = spec.target.rpartition(".")
        self._variant: Variant = getattr(importlib.import_module(f"benchmarks.{module}"), name)(setup, **spec.options)
        self._variant.prepare()
        gc.collect()

    def step(self, index: int) -> Measurement:
        reset_peak_memory()
        cpu_seconds, start = time.process_time(), time.perf_counter()
        counted = self._variant.step(index)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_seconds,
            "peak_bytes": peak_memory(),
            **counted,
        }


class WorkerProcess:
    """A variant in a process of its own, which sleeps whenever it is not its turn."""

    def __init__(self, spec: Spec, setup: Setup) -> None:
        self._name = spec.target
        self._log = Path(setup.folder) / f"{spec.target}-{time.monotonic_ns()}.log"
        threads = {name: str(setup.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", json.dumps({"spec": asdict(spec), "setup": asdict(setup)})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"},
            )
        try:
            self._reply()
        except MeasurementError:
            self.close()
            raise

    def step(self, index: int) -> Measurement:
        assert self._process.stdin is not None
        print(index, file=self._process.stdin, flush=True)
        return self._reply()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _reply(self) -> Measurement:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            complaint = self._log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise MeasurementError(f"{self._name}: {complaint or 'ended without a word'}")
        reply: Measurement = json.loads(line)
        return reply


@contextmanager
def worker_process(spec: Spec, setup: Setup) -> Iterator[Runner]:
    """Runs a variant in a process of its own until the block ends."""
    worker = WorkerProcess(spec, setup)
    try:
        yield worker
    finally:
        worker.close()


@contextmanager
def in_process(spec: Spec, setup: Setup) -> Iterator[Runner]:
    """Runs a variant here; its peak memory is then that of all before it."""
    yield InProcess(spec, setup)


def measure(
    variants: Mapping[str, Spec],
    setup: Setup,
    *,
    same_work: bool,
    start: Callable[[Spec, Setup], AbstractContextManager[Runner]],
) -> dict[str, list[Measurement]]:
    """The measurements of all variants, round by round.

    In a round every variant has one turn; every second round goes through them backwards, so that a machine that is
    getting slower favours none.

    Raises:
        MeasurementError: A variant failed, or the variants did not see as many examples and tokens where they should.
    """
    found: dict[str, list[Measurement]] = {name: [] for name in variants}
    with ExitStack() as stack:
        runners = {name: stack.enter_context(start(spec, setup)) for name, spec in variants.items()}
        began = time.monotonic()
        for index in range(setup.rounds + 1):
            if index > MIN_ROUNDS and time.monotonic() - began > setup.seconds:
                break
            turns = list(runners) if index % 2 else list(reversed(runners))
            turn = {name: runners[name].step(index) for name in turns}
            if same_work:
                check_same_work(turn)
            if index > 0:
                for name, measurement in turn.items():
                    found[name].append(measurement)
    return found


def check_same_work(turn: Mapping[str, Measurement]) -> None:
    """Refuses a round whose variants counted different examples or tokens."""
    for key in SAME_WORK:
        counts = {name: measurement[key] for name, measurement in turn.items() if key in measurement}
        if len(set(counts.values())) > 1:
            raise MeasurementError(f"the variants did different work: {key} is {counts}")


def reset_peak_memory() -> None:
    """Lets the peak begin at what is resident now; without Linux's /proc, at the start of the process."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def peak_memory() -> int:
    """Largest resident size since the reset [bytes]."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
