"""Killed at any moment, resumed each time, a run leaves what it would have left undisturbed, byte for byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mtl.composition import config_dir

STEPS = 60
LEVERS = [
    *("sampler=performance", "sampler.signal=loss_ratio", "weighter=uncertainty", "surgery=pcgrad"),
    *("adapters=shared_and_per_task", "stages=joint_then_weak", f"max_steps={STEPS // 2}", "eval_steps=2"),
    *("eval_scores=false", "keep_last=2", "keep_best=1", "early_stopping_patience=null"),
]  # fmt: skip


class Driver:
    """Runs ``mtl train`` in processes of its own, and kills them from outside."""

    def __init__(self, arguments, folder, num_processes):
        self.folder = folder
        self.command = [
            *(sys.executable, "-m", "mtl.train", *arguments, *LEVERS, f"output_dir={folder}"),
            *("resume_from_checkpoint=auto", f"launch.num_processes={num_processes}"),
        ]
        if num_processes > 1:
            self.command.append("launch.cpu=true")

    def start(self):
        return subprocess.Popen(
            self.command,
            cwd=Path(config_dir()).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self):
        process = self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    def kill_during_training(self, after_steps, patience=0.0):
        """Kills all processes ``patience`` seconds after this many more steps have been logged."""
        process = self.start()
        goal = self.num_steps() + after_steps
        while self.num_steps() < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(patience)
        return self.kill(process)

    def kill_in_a_save(self, which, patience):
        """Stops all processes ``patience`` seconds after the ``which``-th save began; kills them.

        Returns:
            Whether they were really stopped within a save.
        """
        process = self.start()
        checkpoints = self.folder / "checkpoints"
        for _ in range(which):
            while not self.saving(checkpoints) and process.poll() is None:
                pass
            if _ < which - 1:
                while self.saving(checkpoints) and process.poll() is None:
                    pass
        time.sleep(patience)
        for child in self.family(process):
            child.send_signal(signal.SIGSTOP)
        inside = self.saving(checkpoints)
        self.kill(process)
        return inside

    def saving(self, checkpoints):
        """Whether a checkpoint is being written: the writer's folder has a temporary name while it is."""
        try:
            return any(name.endswith((".tmp", ".old")) for name in os.listdir(checkpoints))
        except FileNotFoundError:
            return False

    def family(self, process):
        try:
            root = psutil.Process(process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, process):
        alive = process.poll() is None
        for child in self.family(process):
            child.kill()
        process.communicate()
        return alive

    def num_steps(self):
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                return sum(b'"loss": {' in line and line.endswith(b"\n") and b'"a": ' in line for line in file)
        except FileNotFoundError:
            return 0


def compare(folder, expected, outcome):
    found, whole = outcome(folder), outcome(expected)
    assert found[0] == whole[0], "metrics.jsonl"
    assert found[1]["tasks"] == whole[1]["tasks"]
    assert found[2] == whole[2], "state: counts, optimizer, sampler, ..."
    assert found[3] == whole[3], "tensors: adapters, moments"
    names = sorted(path.relative_to(folder) for path in (folder / "adapters").rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(expected) for path in (expected / "adapters").rglob("*") if path.is_file())
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    steps = [json.loads(line)["step"] for line in found[0].splitlines() if b'"counts"' in line]
    assert steps == list(range(1, STEPS + 1)), "no line twice, none missing"


def run_with_kills(tmp_path, arguments, outcome, num_processes, num_plain, num_in_saves, seed):
    generator = random.Random(seed)
    Driver(arguments, tmp_path / "whole", num_processes).finish()
    driver = Driver(arguments, tmp_path / "killed", num_processes)
    kills = ["save"] * num_in_saves + ["plain"] * num_plain
    generator.shuffle(kills)
    done = {"save": 0, "plain": 0}
    for kind in kills:
        if kind == "save":
            for _ in range(20):  # a save of this model takes milliseconds: not every attempt hits one
                if driver.kill_in_a_save(generator.randint(1, 2), generator.random() * 0.01):
                    done["save"] += 1
                    break
        else:
            done["plain"] += driver.kill_during_training(generator.randint(0, 3), generator.random() * 0.05)
    assert done == {"save": num_in_saves, "plain": num_plain}
    driver.finish()
    compare(tmp_path / "killed", tmp_path / "whole", outcome)


def test_two_kills(tmp_path, arguments, outcome):
    run_with_kills(tmp_path, arguments, outcome, 1, num_plain=1, num_in_saves=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_ten_kills_three_of_them_in_saves(tmp_path, arguments, outcome, num_processes):
    run_with_kills(tmp_path, arguments, outcome, num_processes, num_plain=7, num_in_saves=3, seed=num_processes)
