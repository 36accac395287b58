from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl.surgery import MGDA, SDMGrad, gramian
from mtl.surgery.sdmgrad import onto_simplex


def random_rows(num_rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, 15, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_projection_onto_the_simplex() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 7):
        for _ in range(100):
            point = generator.normal(size=size) * 10 ** generator.uniform(-3, 3)
            found = onto_simplex(point)
            assert found.min() >= 0
            assert found.sum() == pytest.approx(1, abs=1e-12)
            # The nearest point of a convex set: no other one lies further along the way to the outside.
            assert ((point - found) @ (np.eye(size) - found).T).max() <= 1e-9 * (1 + np.abs(point).max())
    assert onto_simplex(np.array([0.2, 0.3, 0.5])).tolist() == pytest.approx([0.2, 0.3, 0.5])


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 3.0])
def test_repeated_calls_reach_the_shortest_combination_with_the_pull(lambda_: float) -> None:
    for seed in range(5):
        rows = random_rows(2 + seed, seed)
        surgery = SDMGrad(lambda_=lambda_)
        for _ in range(300):
            found = surgery.coefficients(gramian(rows)).numpy()
        num_rows = len(rows)
        weights = found * (1 + lambda_) - lambda_ / num_rows
        assert weights.min() >= -1e-9
        assert weights.sum() == pytest.approx(1)
        slope = gramian(rows).numpy() @ (weights + lambda_ / num_rows)
        assert slope[weights > 1e-6].max() - slope.min() <= 1e-6 * np.abs(slope).max()


def test_without_the_pull_it_ends_as_mgda() -> None:
    rows, surgery = random_rows(), SDMGrad(lambda_=0.0)
    for _ in range(300):
        found = surgery(rows)
    torch.testing.assert_close(found, MGDA()(rows), rtol=1e-6, atol=1e-8)


def test_a_large_pull_is_the_mean() -> None:
    rows = random_rows()
    torch.testing.assert_close(SDMGrad(lambda_=1e9)(rows), rows.mean(dim=0), rtol=1e-6, atol=1e-8)


def test_steps_settle_at_the_usual_learning_rate() -> None:
    """At the paper's rate itself the weights of orthogonal rows leap between corners of the simplex."""
    rows = torch.eye(4, dtype=torch.float64) * torch.tensor([[1.0], [1.1], [0.9], [1.0]], dtype=torch.float64)
    surgery = SDMGrad()
    found = torch.stack([surgery.coefficients(gramian(rows)) for _ in range(30)])
    assert (found[-1] - found[-2]).abs().max() < 1e-9
    assert found.max() < 0.5


@pytest.mark.parametrize("lr", [0.01, 10.0])
def test_the_scale_of_the_gradients_does_not_matter(lr: float) -> None:
    for seed in range(20):
        rows = random_rows(5, seed)
        expected = [surgery.coefficients(gramian(rows)) for surgery in [SDMGrad(lr=lr)] for _ in range(5)]
        for factor in (1e-100, 1e-6, 1e6):
            surgery = SDMGrad(lr=lr)
            for each in expected:
                torch.testing.assert_close(surgery.coefficients(gramian(factor * rows)), each, rtol=1e-7, atol=1e-9)


def test_one_step_by_hand() -> None:
    inner = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # The mean norm is 1.5, the normal matrix diag(16/9, 4/9); from (1/2, 1/2) with the pull 1/2 u: gradient (4/3, 1/3).
    found = SDMGrad(lr=0.3, momentum=0.0, n_iter=1, lambda_=0.5, scale="paper").coefficients(inner)
    # (1/2 - 0.3 * 4/3, 1/2 - 0.3 / 3) = (0.1, 0.4), and 1/4 more for each to sum to 1.
    assert found.tolist() == pytest.approx([(0.35 + 0.25) / 1.5, (0.65 + 0.25) / 1.5], rel=1e-12)


def test_two_steps_with_momentum_by_hand() -> None:
    inner = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    surgery = SDMGrad(lr=0.1, momentum=0.5, n_iter=2, lambda_=0.0)
    surgery.load_state_dict({"weights": {"values": torch.tensor([2.0, 0.0], dtype=torch.float64)}})  # M w
    # (1, 0) -> velocity (1, 0), (0.9, 0) -> (0.95, 0.05) -> velocity (1.45, 0.05), (0.805, 0.045) -> (0.88, 0.12)
    assert surgery.coefficients(inner).tolist() == pytest.approx([0.88, 0.12], rel=1e-12)


def test_a_product_of_two_batches_need_not_be_symmetric() -> None:
    cross = random_rows(3, 1) @ random_rows(3, 2).T
    surgery = SDMGrad()
    for _ in range(5):
        found = surgery.coefficients(cross)
        assert torch.isfinite(found).all()
        assert float(found.sum()) == pytest.approx(1)
    negative = -torch.eye(3, dtype=torch.float64)
    assert SDMGrad().coefficients(negative).tolist() == pytest.approx([1 / 3] * 3)


def test_absent_tasks_keep_their_weight_and_new_ones_start_in_the_mean() -> None:
    rows = random_rows()
    surgery = SDMGrad()
    for _ in range(10):
        surgery.coefficients(gramian(rows[:3]), [0, 1, 2])
    before = surgery.state_dict()["weights"]["values"]
    surgery.coefficients(gramian(rows[2:]), [1, 5])
    after = surgery.state_dict()["weights"]["values"]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert after[[3, 4]].isnan().all()
    assert float(after[[1, 5]].sum()) == pytest.approx(2)
    torch.testing.assert_close(
        SDMGrad().coefficients(gramian(rows), [3, 5, 6, 9]), SDMGrad().coefficients(gramian(rows))
    )


def test_state_round_trips_bitwise() -> None:
    surgery, resumed = SDMGrad(), SDMGrad()
    for seed in range(5):
        surgery.coefficients(gramian(random_rows(3, seed)), [0, 2, 3])
    state = surgery.state_dict()
    expected = [surgery.coefficients(gramian(random_rows(3, seed)), [0, 1, 3]) for seed in range(5)]
    resumed.load_state_dict(state)
    found = [resumed.coefficients(gramian(random_rows(3, seed)), [0, 1, 3]) for seed in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"^lr: must be above 0 and finite, found 0.0; "),
        ({"momentum": 1.0}, r"^momentum: must be in \[0, 1\), found 1.0; "),
        ({"n_iter": 0}, r"^n_iter: must be at least 1, found 0; "),
        ({"lambda_": -0.1}, r"^lambda_: must be at least 0 and finite, found -0.1; "),
        ({"scale": "sum"}, r"^scale: "),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SDMGrad(**options)
