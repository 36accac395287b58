"""The numbers of a step do not depend on how it is cut or spread.

200 random steps, in float64 and float32, on one process, two, three, and two with sharded parameters, against one
reference that shares no code with them but the model: each task's examples in one padded batch, and transformers' own
loss.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file

from mtl.distributed import Distributed

WORKER = Path(__file__).parent / "workers" / "cut_anyhow.py"
NUM_CASES = 200
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}

spec = importlib.util.spec_from_file_location("cut_anyhow", WORKER)
worker = importlib.util.module_from_spec(spec)
sys.modules["cut_anyhow"] = worker
spec.loader.exec_module(worker)
CASES = {index: worker.random_case(index) for index in range(NUM_CASES)}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Starts all processes at once, each of which runs all cases: they mostly wait for each other."""
    folder = tmp_path_factory.mktemp("cut")
    started = {}
    for num_processes, names in ((2, ("2 processes", "2 processes with FSDP2")), (3, ("3 processes",))):
        outputs = [folder / f"{name}.safetensors" for name in names]
        launcher = [
            *("-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={num_processes}"),
            *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
        ]
        with (folder / f"{num_processes}.txt").open("w") as text:
            process = subprocess.Popen(
                [sys.executable, *launcher, *map(str, (WORKER, NUM_CASES, *outputs))],
                env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                stdout=text,
                stderr=subprocess.STDOUT,
            )
        started |= {name: (output, process) for name, output in zip(names, outputs, strict=True)}
    yield started
    for _, process in started.values():
        process.terminate()  # not killed: the launcher ends its ranks
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def expected(processes):
    """Losses, rows and private gradients of all cases in float64, by name."""
    results = {}
    made = {layout: worker.make(layout, torch.float64) for layout in worker.LAYOUTS}
    for index, case in CASES.items():
        model, layout = made[case.layout]
        tasks = sorted({task for task, _ in case.examples})
        losses, rows, weights = [], [], case.scale_T[tasks]
        for task, weight in zip(tasks, weights, strict=True):
            shared, private = layout.shared_parameters(), layout.private_parameters(task)
            with layout.activate(task):
                loss = model(**padded([example for t, example in case.examples if t == task])).loss
            gradients = [gradient.flatten() for gradient in torch.autograd.grad(loss, [*shared, *private])]
            losses.append(loss.detach())
            rows.append(weight * torch.cat(gradients[: len(shared)]))
            if private:
                results[f"{index}/private{task}"] = weight * torch.cat(gradients[len(shared) :])
        results[f"{index}/losses"] = torch.stack(losses)
        rows_MN = torch.stack(rows)
        results[f"{index}/rows"] = rows_MN if case.apart else rows_MN.sum(0, keepdim=True)
        results[f"{index}/gramian"] = results[f"{index}/rows"] @ results[f"{index}/rows"].T
    return results


def padded(examples):
    """One batch, padded on the right, with an attention mask and labels, as transformers' own trainer makes it."""
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids, mask, labels = (torch.full(shape, value) for value in (1, 0, -100))
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.from_numpy(example.input_ids.astype(np.int64))
        mask[row, :length] = 1
        labels[row, :length] = torch.where(torch.from_numpy(example.is_target), input_ids[row, :length], -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def check(found, expected):
    """Every row to its own norm, every loss to itself; says which case is worst."""
    assert {name.replace("/float64", "").replace("/float32", "") for name in found} == set(expected)
    assert len(found) == 2 * len(expected)
    for name, tensor in found.items():
        index, dtype, what = name.split("/")
        reference = expected[f"{index}/{what}"]
        if what == "losses":
            error = ((tensor - reference).abs() / reference).max()
        elif what == "gramian":
            norms = reference.diagonal().sqrt()
            error = ((tensor - reference).abs() / norms[:, None] / norms).max()
        else:
            error = (torch.linalg.vector_norm(tensor - reference, dim=-1) / reference.norm(dim=-1)).max()
        assert error < TOLERANCE[dtype], (name, float(error), CASES[int(index)])


def test_the_cases_are_what_they_should_be():
    """All that may go wrong comes up often."""
    few = [case for case in CASES.values() if len(case.examples) < 3]
    absent = [case for case in CASES.values() if len({task for task, _ in case.examples}) < worker.TASKS]
    assert len(few) > 20
    assert len(absent) > 20
    assert {len(case.examples) for case in CASES.values()} >= set(range(1, 9))
    for layout in worker.LAYOUTS:
        for apart in (True, False):
            for packing in (True, False):
                found = [c for c in CASES.values() if (c.layout, c.apart, c.packing) == (layout, apart, packing)]
                assert {case.max_tokens for case in found} >= {1, 25, 60, 10_000}


def test_on_one_process(expected):
    check(worker.results_of(Distributed(Accelerator(cpu=True)), CASES), expected)


@pytest.mark.parametrize("name", ["2 processes", "3 processes", "2 processes with FSDP2"])
def test_on_several(processes, expected, name):
    output, process = processes[name]
    assert process.wait(timeout=300) == 0, (output.parent / f"{name[0]}.txt").read_text(encoding="utf-8")
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"ranks": name[0], "sharded": str("FSDP2" in name)}
    check(load_file(output), expected)
