"""How long the command line takes to be there."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import Measurement, Setup

# Runs the command and leaves it, with the time, where the first step has its examples and calls the model.
UP_TO_THE_FIRST_FORWARD = """
import os, sys, time
import mtl.gradients, mtl.step
from mtl.cli import main

draw_batch = mtl.step.draw_batch

def leave(*arguments):
    print(time.time(), flush=True)
    os._exit(0)

def draw_and_leave(*arguments):
    mtl.gradients.target_nll = leave
    return draw_batch(*arguments)

mtl.step.draw_batch = draw_and_leave
sys.exit(main(sys.argv[1:]))
"""


class Help:
    """``mtl --help``."""

    def __init__(self, setup: Setup) -> None:
        pass

    def prepare(self) -> None:
        """Nothing to do."""

    def step(self, index: int) -> Measurement:
        subprocess.run([sys.executable, "-m", "mtl.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
        return {"peak_bytes": peak_memory_of_children()}


class FirstForward:
    """``mtl train`` on the default tasks, from the command to the first forward of the training.

    The warm-up fills the caches: dequantized model, tokens, evaluation of the model before training.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def prepare(self) -> None:
        """Nothing to do."""

    def step(self, index: int) -> Measurement:
        folder = Path(tempfile.mkdtemp(dir=self.setup.folder))
        overrides = [
            *(f"model.name_or_path={self.setup.model}", f"seed={self.setup.seed}", f"output_dir={folder / 'run'}"),
            *("max_steps=1", "max_eval_examples=4", "max_test_examples=4", "too_long=drop"),
        ]
        start = time.time()
        finished = subprocess.run(
            [sys.executable, "-c", UP_TO_THE_FIRST_FORWARD, "train", *overrides],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(self.setup.threads)},
        )
        return {"seconds": float(finished.stdout.splitlines()[-1]) - start, "peak_bytes": peak_memory_of_children()}


def peak_memory_of_children() -> int:
    """Largest resident size of a finished process that was started here [bytes]."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
