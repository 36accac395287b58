from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from mtl.reporting.records import MANY_TASKS
from mtl.reporting.run_log import RunLog
from mtl.run import RunState, StageParts
from mtl.samplers import Equal
from mtl.stages import Stage
from mtl.step import StepOutcome
from mtl.surgery import PCGrad
from mtl.weighters import Uncertainty


def parts_of_stage(num_tasks: int, stage: Stage) -> StageParts:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    return StageParts(
        stage=stage,
        tasks=list(range(num_tasks)),
        focus=list(range(num_tasks)),
        num_steps=100,
        batch_size=64,
        sampler=Equal([10] * num_tasks),
        weighter=Uncertainty(num_tasks),
        surgery=PCGrad(),
        optimizer=optimizer,
        scheduler=ConstantLR(optimizer),
        evaluation_steps=frozenset({100}),
        parameters=[],
    )


def outcome(num_tasks: int, tasks: list[int]) -> StepOutcome:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(tasks), 80, generator=generator, dtype=torch.float64)
    return StepOutcome(
        tasks=tasks,
        counts_M=[1] * len(tasks),
        losses_M=torch.rand(len(tasks), generator=generator, dtype=torch.float64),
        shares_M=torch.full((len(tasks),), 1 / len(tasks), dtype=torch.float64),
        weights_T=torch.rand(num_tasks, generator=generator, dtype=torch.float64),
        probabilities_T=torch.rand(num_tasks, generator=generator, dtype=torch.float64).tolist(),
        gramian_MM=rows @ rows.T,
        coefficients_M=torch.rand(len(tasks), generator=generator, dtype=torch.float64),
        grad_norm=1.0,
        learning_rate=0.1,
        num_tokens=100,
        num_targets_M=[5] * len(tasks),
        rows=[(task, 0) for task in tasks],
    )


def run_log(folder: Path, names: list[str]) -> RunLog:
    config = {"seed": 0, "tasks": {name: {"path": name} for name in names}}
    return RunLog(folder, config, dict.fromkeys(names, "accuracy"), dict.fromkeys(names, 10), step=0, num_records=0)


def test_1024_tasks_cost_little_and_leave_readable_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"task_{number:04}" for number in range(1024)]
    state, parts = RunState(1024), parts_of_stage(1024, Stage("weak", tasks="weakest", num_weakest=1024))
    state.stage_weakness_T = [1.0] * 1024
    step = outcome(1024, list(range(0, 1024, 16)))
    log = run_log(tmp_path, names)
    log.begin_stage(state, parts, names)
    seconds = []
    for number in range(1, 21):
        state.step, state.tokens = number, 100 * number
        start = time.perf_counter()
        log.step(state, parts, names, step)
        seconds.append(time.perf_counter() - start)
    log.close(succeeded=True)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert len(lines) == 20
    assert max(map(len, lines)) < 96_000  # 60,000 of them for p and lambda; all cosines would add 90,000
    record = json.loads(lines[-1])
    assert {len(record[key]) for key in ("p", "lambda")} == {1024}
    assert {len(record[key]) for key in ("loss", "a", "w", "counts", "grad_norm_task")} == {64}
    assert min(seconds) < 0.02  # of a step of 64 examples, which takes seconds
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "TensorBoard" in line] == [
        "TensorBoard shows means, extremes and the 10 worst of 1,024 tasks; metrics.jsonl has every task"
    ]
    assert f"{', '.join(names[:12])}, and 1,012 more" in shown[1]
    assert shown[2].endswith("task_0011 1.000, and 1,012 more")
    assert all(len(line) < 400 for line in shown)


def test_few_tasks_are_all_named_and_nothing_is_said_of_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run_log(tmp_path, [f"t{number}" for number in range(MANY_TASKS)])
    log.begin_stage(RunState(3), parts_of_stage(3, Stage("joint")), ["a", "情 b", "[c]"])
    log.close(succeeded=True)
    assert capsys.readouterr().out.splitlines()[0] == "Stage joint: 100 steps of 64 examples on a, 情 b, [c]"
