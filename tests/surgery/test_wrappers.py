"""Surgery around another surgery: smoothed, normalised, now and then, by groups of columns."""

from __future__ import annotations

import pytest
import torch

from mtl.surgery import CRMOGM, MGDA, Every, GradDrop, Grouped, Mean, Normalized, PCGrad, UPGrad, gramian


def random_rows(num_rows: int, seed: int = 0, num_columns: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)


def random_gramian(num_rows: int, seed: int = 0) -> torch.Tensor:
    return gramian(random_rows(num_rows, seed))


def test_smoothing_is_the_exponential_mean_and_leaves_absent_tasks_alone() -> None:
    surgery, plain = CRMOGM(MGDA(), alpha=0.75), MGDA()
    first, second, third = random_gramian(3, 1), random_gramian(2, 2), random_gramian(3, 3)
    assert torch.equal(surgery.coefficients(first, [0, 1, 4]), plain.coefficients(first))
    # A coefficient of two rows and one of three compare as shares of the mean: M w.
    kept = 3 * plain.coefficients(first)
    newest = 2 * plain.coefficients(second)
    expected = torch.stack([0.75 * kept[1] + 0.25 * newest[0], newest[1]]) / 2
    torch.testing.assert_close(surgery.coefficients(second, [1, 2]), expected, rtol=1e-14, atol=0)
    newest = 3 * plain.coefficients(third)
    expected = torch.stack([0.75 * kept[0] + 0.25 * newest[0], 1.5 * expected[0] + 0.25 * newest[1],
                            0.75 * kept[2] + 0.25 * newest[2]]) / 3  # fmt: skip
    torch.testing.assert_close(surgery.coefficients(third, [0, 1, 4]), expected, rtol=1e-14, atol=0)


def test_normalised_surgery_does_not_feel_the_lengths_of_the_rows() -> None:
    rows = random_rows(4, 5)
    lengths = torch.tensor([1e-3, 1.0, 7.0, 1e4], dtype=torch.float64)
    units = rows / rows.norm(dim=1, keepdim=True)
    for inner in (Mean(), UPGrad(), MGDA()):
        found = Normalized(inner)(units * lengths[:, None])
        torch.testing.assert_close(found, inner(units) * lengths.mean(), rtol=1e-9, atol=1e-9)
    assert Normalized(Mean()).weights_act == "no"
    torch.testing.assert_close(Normalized(Mean())(rows[:1].repeat(3, 1)), rows[0], rtol=1e-14, atol=0)
    assert torch.isfinite(Normalized(Mean()).coefficients(torch.zeros(2, 2))).all()


def test_coefficients_are_solved_for_at_every_kth_call_and_for_new_tasks() -> None:
    surgery, plain = Every(MGDA(), 3), MGDA()
    gramians = [random_gramian(2, seed) for seed in range(6)]
    assert torch.equal(surgery.coefficients(gramians[0], [0, 1]), plain.coefficients(gramians[0]))
    assert torch.equal(surgery.coefficients(gramians[1], [0, 1]), plain.coefficients(gramians[0]))
    assert torch.equal(surgery.coefficients(gramians[2], [1, 2]), plain.coefficients(gramians[2])), "2 is new"
    assert torch.equal(surgery.coefficients(gramians[3], [0, 1]), plain.coefficients(gramians[3])), "the fourth call"
    kept = torch.stack([plain.coefficients(gramians[3])[0], plain.coefficients(gramians[2])[1]])
    assert torch.equal(surgery.coefficients(gramians[4], [0, 2]), kept)


def test_groups_have_surgery_and_orders_of_their_own() -> None:
    rows = random_rows(5, 7, num_columns=30)
    grouped = Grouped(lambda: PCGrad(seed=1), [10, 5, 15])
    expected = torch.cat([PCGrad(seed=1)(group) for group in rows.split([10, 5, 15], dim=1)])
    assert torch.equal(grouped(rows), expected)
    assert grouped.weights_act == "yes"


@pytest.mark.parametrize(
    "make",
    [
        lambda: CRMOGM(PCGrad(seed=2)),
        lambda: Normalized(PCGrad(seed=2)),
        lambda: Every(PCGrad(seed=2), 2),
        lambda: Grouped(lambda: CRMOGM(PCGrad(seed=2)), [4, 8]),
    ],
)
def test_state_round_trips_bitwise(make) -> None:
    first, second = make(), make()
    for seed in range(5):
        first(random_rows(4, seed), [0, 2, 3, 7])
    second(random_rows(3, 9))  # whatever it was
    second.load_state_dict(first.state_dict())
    for seed in range(5, 10):
        rows = random_rows(3, seed)
        assert torch.equal(first(rows, [0, 3, 5]), second(rows, [0, 3, 5]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CRMOGM(MGDA(), alpha=1.0), r"alpha: must be in \[0, 1\), found 1.0"),
        (lambda: CRMOGM(GradDrop()), "inner: must be surgery that works by coefficients, found GradDrop"),
        (lambda: Normalized("mean"), "inner: must be surgery that works by coefficients, found str"),
        (lambda: Every(MGDA(), 0), "every: must be at least 1, found 0"),
    ],
)
def test_refuses(make, words) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        make()
