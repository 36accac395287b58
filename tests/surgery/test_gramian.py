from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtl.surgery import GramianSurgery, Mean, gramian

MODULE = import_module("mtl.surgery.gramian")  # the package's attribute of this name is the function


def random_rows(num_rows: int, num_parameters: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, num_parameters, generator=generator, dtype=torch.float64).to(dtype)


def cosine_error(found: Tensor, rows: Tensor) -> float:
    """The largest error of an entry, relative to the norms of its two rows."""
    expected = rows.double() @ rows.double().T
    norms = expected.diagonal().sqrt()
    return float(((found - expected) / (norms[:, None] * norms)).abs().max())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
@pytest.mark.parametrize("piece", [1, 3, 10, 101, 2**13])
def test_is_the_product_however_it_is_cut(
    dtype: torch.dtype, tolerance: float, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "PIECE", piece)
    rows = random_rows(7, 101, dtype)
    found = gramian(rows)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert cosine_error(found, rows) < tolerance


@pytest.mark.parametrize("common", [0.0, 100.0])
def test_keeps_the_cosines_of_long_rows_that_one_sum_in_float32_loses(common: float) -> None:
    rows = random_rows(4, 1_000_000, torch.float32) + common * random_rows(1, 1_000_000, torch.float32)
    assert cosine_error(gramian(rows), rows) < 5e-8
    one_sum = torch.zeros(4, 4)
    for piece in rows.split(1_000, dim=1):
        one_sum += piece @ piece.T
    assert cosine_error(one_sum.double(), rows) > 1e-7


class Float64Sizes(TorchDispatchMode):
    """Records the number of elements of every float64 tensor that comes into being."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.dtype == torch.float64:
            self.largest = max(getattr(self, "largest", 0), found.numel())
        return found


def test_makes_no_float64_copy_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "PIECE", 8)
    rows = random_rows(4, 1_000, torch.float32)
    with Float64Sizes() as sizes:
        gramian(rows)
    assert 0 < sizes.largest <= 16


@pytest.mark.parametrize("sizes", [[1e-30], [1e30], [1e-36], [1e-30, 1.0, 1e30], [1e-12, 1e19, 0.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_squares_leave_the_range_of_float32(sizes: list[float], dtype: torch.dtype) -> None:
    """They used to come out as infinite, or as rows of 0."""
    lengths = torch.tensor([sizes[row % len(sizes)] for row in range(5)], dtype=torch.float64)
    rows = (random_rows(5, 20_000) * lengths[:, None]).to(dtype)
    found, expected = gramian(rows), rows.double() @ rows.double().T
    norms = expected.diagonal().sqrt()
    assert torch.equal(found, found.T)
    assert ((found - expected).abs() <= 1e-6 * norms[:, None] * norms).all()


@pytest.mark.parametrize("num_rows", [1, 3, 64])
def test_full_size_rows_with_a_rest(num_rows: int) -> None:
    rows = random_rows(num_rows, 100 * MODULE.PIECE + 777, torch.float32)
    assert cosine_error(gramian(rows), rows) < 1e-7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    rows = random_rows(4, 3_000, torch.float32)
    rows[2, 2_999] = bad
    finite = gramian(rows).isfinite()
    assert not finite[2].any()
    assert finite[[0, 1, 3]][:, [0, 1, 3]].all()


def test_is_detached_and_takes_views() -> None:
    rows = random_rows(3, 40).requires_grad_()
    found = gramian(rows[:, ::2])
    assert not found.requires_grad
    torch.testing.assert_close(found, (rows[:, ::2] @ rows[:, ::2].T).detach())


def test_no_shared_parameters_give_zeros() -> None:
    assert torch.equal(gramian(torch.zeros(2, 0)), torch.zeros(2, 2, dtype=torch.float64))


class Recorder(GramianSurgery):
    weights_act = "no"

    def coefficients(self, gramian_MM: Tensor, tasks: object = None) -> Tensor:
        self.seen = gramian_MM, tasks
        return torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_base_class_combines_in_the_type_of_the_rows(dtype: torch.dtype) -> None:
    rows, surgery = random_rows(3, 20, dtype), Recorder()
    combined = surgery(rows, [4, 1, 2])
    assert combined.dtype == dtype
    assert combined.shape == (20,)
    torch.testing.assert_close(combined, rows[0] - 2 * rows[1] + rows[2] / 2)
    assert torch.equal(surgery.seen[0], gramian(rows))
    assert surgery.seen[1] == [4, 1, 2]


def test_stateless_surgery_refuses_the_state_of_another() -> None:
    surgery = Mean()
    surgery.load_state_dict(surgery.state_dict())
    with pytest.raises(ValueError, match=r"^surgery state: must be empty for Mean, found \['generator'\]; "):
        surgery.load_state_dict({"generator": torch.zeros(1)})


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_mean_is_the_mean_row(num_rows: int) -> None:
    rows = random_rows(num_rows, 30)
    assert Mean().coefficients(gramian(rows)).tolist() == [1 / num_rows] * num_rows
    torch.testing.assert_close(Mean()(rows), rows.mean(dim=0), rtol=1e-14, atol=1e-15)


def test_mean_of_one_row_is_that_row_bitwise_and_weights_act() -> None:
    row = random_rows(1, 30, torch.float32)
    assert torch.equal(Mean()(row), row[0])
    rows, weights = random_rows(3, 30), torch.tensor([[2.0], [1.0], [0.0]], dtype=torch.float64)
    torch.testing.assert_close(Mean()(weights * rows), (2 * rows[0] + rows[1]) / 3, rtol=1e-14, atol=1e-15)
    assert Mean().weights_act == "yes"
