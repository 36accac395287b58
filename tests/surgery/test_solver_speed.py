"""The time of one solution for 64 tasks, on one core."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl.surgery import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradVac,
    NashMTL,
    PCGrad,
    SDMGrad,
    UPGrad,
    gramian,
)

NUM_TASKS = 64


def problems() -> dict[str, Tensor]:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(NUM_TASKS, 2_000))
    conflicting = rows - 0.9 * rows.mean(axis=0)
    lengths = 10 ** generator.uniform(-3, 3, size=(NUM_TASKS, 1))
    found = {
        "random": rows,
        "conflicting": conflicting,
        "of all lengths": lengths * conflicting,
        "few columns": (conflicting - 0.09 * rows.mean(axis=0))[:, :80],
        "more rows than columns": rows[:, :28],
        "of low rank": rows[:, :8] @ rows[:8] + 1e-3 * rows,
    }
    return {name: gramian(torch.from_numpy(rows).float()) for name, rows in found.items()}


PROBLEMS = problems()


@pytest.mark.parametrize(
    ("surgery", "limit"),
    [
        (PCGrad(), 0.02),
        (GradVac(), 0.02),
        (MGDA(), 0.02),
        (NashMTL(), 0.02),
        (FairGrad(), 0.02),
        (AlignedMTL(), 0.02),
        (ConFIG(), 0.02),
        (IMTLG(), 0.02),
        (DualProj(), 0.02),
        (SDMGrad(), 0.02),
        (CAGrad(), 0.05),
        (UPGrad(), 0.2),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_solution_is_found_in_time(surgery, limit: float, problem: str) -> None:
    seconds = []
    for _ in range(7):
        start = time.process_time()  # of all threads together, and without what other programs take
        surgery.coefficients(PROBLEMS[problem])
        seconds.append(time.process_time() - start)
    assert statistics.median(seconds) <= limit
