from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl.surgery import PCD, DualProj, gramian

NAMES = ["a", "b", "情感 😀"]


def random_rows(num_rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_golden_values() -> None:
    inner = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    assert PCD(0, tau=0.0).coefficients(inner).tolist() == [0.5, 0.5]  # <g_1, g_0> = 1/2 already
    # <g_1, d> = 1/2 + 2 v = tau 2, so v = tau - 1/4.
    assert PCD(0, tau=0.75).coefficients(inner).tolist() == pytest.approx([1.0, 0.5], rel=1e-12)
    inner = torch.tensor([[1.0, -3.0], [-3.0, 16.0]], dtype=torch.float64)
    assert PCD(0, tau=0.0).coefficients(inner).tolist() == pytest.approx([1.5, 0.5], rel=1e-12)
    assert PCD(1, tau=0.0).coefficients(inner).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5, 1.0])
def test_one_primary_task_has_a_closed_form(tau: float) -> None:
    for seed in range(200):
        rows = random_rows(4, seed)
        mean, primary = rows.mean(dim=0), rows[2]
        missing = max(tau * primary @ primary - primary @ mean, torch.zeros(()))
        expected = mean + missing / (primary @ primary) * primary
        torch.testing.assert_close(PCD(2, tau=tau)(rows), expected, rtol=1e-10, atol=1e-12)


def test_with_all_tasks_primary_and_tau_0_it_is_dualproj() -> None:
    for seed in range(200):
        rows = random_rows(5, seed)
        torch.testing.assert_close(PCD(range(5), tau=0.0)(rows), DualProj()(rows), rtol=1e-9, atol=1e-11)


def test_primary_tasks_get_their_due_and_no_shorter_change_would_do() -> None:
    changed = 0
    for seed in range(200):
        rows = random_rows(6, seed)
        d = PCD([1, 4], tau=0.3)(rows)
        due = 0.3 * rows[[1, 4]].square().sum(dim=1)
        gains = rows[[1, 4]] @ d
        assert (gains >= due * (1 - 1e-10)).all()
        # The change is a combination, with coefficients not below 0, of the primary rows whose conditions are tight.
        change = d - rows.mean(dim=0)
        solution = torch.linalg.lstsq(rows[[1, 4]].T, change[:, None]).solution[:, 0]
        torch.testing.assert_close(solution @ rows[[1, 4]], change, rtol=1e-9, atol=1e-11)
        assert (solution >= -1e-10).all()
        assert (solution * (gains - due)).abs().max() <= 1e-9
        changed += bool(change.norm() > 1e-9)
    assert changed > 150


def test_tasks_are_found_by_name_and_by_index() -> None:
    rows = random_rows()
    expected = PCD(2)(rows)
    for primary in ("情感 😀", ["情感 😀"], 2, [2], [2, "情感 😀"]):
        assert torch.equal(PCD(primary, names=NAMES)(rows), expected)


def test_an_absent_primary_task_leaves_the_mean_and_others_keep_their_index() -> None:
    rows = random_rows(2)
    mean = [0.5, 0.5]
    assert PCD(0, tau=0.9).coefficients(gramian(rows), [1, 2]).tolist() == mean
    assert PCD([0, 2], tau=0.9).coefficients(gramian(rows), [1, 2]).tolist() == (
        PCD(1, tau=0.9).coefficients(gramian(rows)).tolist()
    )


def test_a_primary_row_of_0_asks_for_nothing() -> None:
    rows = torch.stack([torch.zeros(12, dtype=torch.float64), *random_rows(2)])
    torch.testing.assert_close(PCD(0, tau=1.0)(rows), rows.mean(dim=0))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 1e-2])
def test_opposed_primary_tasks_are_only_kept_from_harm(angle: float) -> None:
    first, second, third = random_rows()
    rows = torch.stack([first, -first + angle * second, third])
    d = PCD([0, 1], tau=0.5)(rows)
    assert (rows[:2] @ d >= -1e-7).all()
    assert d.norm() <= rows.mean(dim=0).norm() * (1 + 1e-6)
    torch.testing.assert_close(d, PCD([0, 1], tau=0.0)(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"primary": "x", "names": NAMES},
            r"^primary: must be a task of the run, found 'x'; the tasks are \['a', 'b', ",
        ),
        ({"primary": "a"}, r"^names: must be given to find a task by name, found None; "),
        ({"primary": []}, r"^primary: must be at least one task, found none; "),
        ({"primary": 3, "names": NAMES}, r"^primary: must be an index from 0 to 2, found 3; "),
        ({"primary": -1}, r"^primary: must be an index from 0, found -1; "),
        ({"primary": 0, "tau": 1.5}, r"^tau: must be a share in \[0, 1\], found 1.5; "),
        ({"primary": 0, "scale": "sum"}, r"^scale: "),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PCD(**options)
