"""Every surgery, and random rows that are hard on it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from mtl.surgery import (
    CRMOGM,
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradDrop,
    GradVac,
    Mean,
    NashMTL,
    Normalized,
    PCGrad,
    SDMGrad,
    UPGrad,
)

EVERY_SURGERY = {
    "Mean": Mean,
    "MGDA": MGDA,
    "CAGrad": CAGrad,
    "CAGrad(1.5)": partial(CAGrad, c=1.5),
    "NashMTL": NashMTL,
    "FairGrad(0.5)": partial(FairGrad, alpha=0.5),
    "FairGrad(2)": FairGrad,
    "FairGrad(5)": partial(FairGrad, alpha=5.0),
    "UPGrad": UPGrad,
    "DualProj": DualProj,
    "AlignedMTL": AlignedMTL,
    "AlignedMTL(rmse)": partial(AlignedMTL, scale_mode="rmse"),
    "ConFIG": ConFIG,
    "IMTLG": IMTLG,
    "PCGrad": PCGrad,
    "GradVac": GradVac,
    "GradVac(0.5)": partial(GradVac, beta=0.5),
    "PCD": partial(PCD, primary=0),
    "PCD(0, 1)": partial(PCD, primary=[0, 1], tau=0.3),
    "SDMGrad": SDMGrad,
    "GradDrop": GradDrop,
    "CRMOGM": lambda **options: CRMOGM(UPGrad(**options)),
    "Normalized": lambda **options: Normalized(UPGrad(**options)),
}


def pytest_generate_tests(metafunc):
    """A test that takes ``make_surgery`` runs for every surgery."""
    if "make_surgery" in metafunc.fixturenames:
        metafunc.parametrize("make_surgery", EVERY_SURGERY.values(), ids=EVERY_SURGERY)


def hard_rows(num_problems, seed=0):
    """Rows of 2 to 16 tasks, of five kinds in turn."""
    generator = np.random.default_rng(seed)
    problems = []
    for index in range(num_problems):
        num_rows, num_columns = 2 + index // 5 % 15, int(generator.integers(3, 60))
        rows = generator.normal(size=(num_rows, num_columns))
        if index % 5 == 1:  # conflicting
            rows -= 0.9 * rows.mean(axis=0)
        elif index % 5 == 2:  # of norms over six decades
            rows = (rows - 0.9 * rows.mean(axis=0)) * 10 ** generator.uniform(-3, 3, size=(num_rows, 1))
        elif index % 5 == 3:  # nearly singular
            rank = max(1, num_rows // 2)
            low_rank = generator.normal(size=(num_rows, rank)) @ generator.normal(size=(rank, num_columns))
            rows = low_rank + 10.0 ** generator.uniform(-9, -3) * rows
        elif index % 5 == 4:  # some tasks several times
            rows = rows[generator.integers(0, max(2, num_rows // 2), size=num_rows)]
        problems.append(rows)
    return problems


@pytest.fixture(scope="session")
def hard_problems():
    return hard_rows(500)
