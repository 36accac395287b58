"""TorchJD's weightings behind the interface of this package; where it is installed (the extra torchjd)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mtl.surgery import PCGrad, TorchJD, gramian

aggregation = pytest.importorskip("torchjd.aggregation")

OPTIONS = {
    "CAGradWeighting": {"c": 0.5},
    "ConstantWeighting": {"weights": [1.0, 2.0, 3.0, 4.0, 5.0]},
    "FairGradWeighting": {"alpha": 2.0},
    "KrumWeighting": {"n_byzantine": 0},
}
STATEFUL = ["GradVacWeighting", "MoDoWeighting", "PCDWeighting", "SDMGradWeighting"]
UNFIT = ["CRMOGMWeighting", "ExcessMTLWeighting", "Weighting"]
WEIGHTINGS = sorted(name for name in aggregation.__all__ if name.endswith("Weighting") and name not in UNFIT)


def random_gramian(num_rows: int = 3, seed: int = 0) -> Tensor:
    rows = torch.randn(num_rows, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gramian(rows)


def make(name: str, **options: object) -> TorchJD:
    try:
        return TorchJD(name, OPTIONS.get(name), **options)
    except ValueError as error:
        if "must have its packages installed" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_coefficients_are_those_of_the_weighting(name: str) -> None:
    surgery = make(name, seed=4, scale="paper")
    options = {
        key: torch.tensor(value) if isinstance(value, list) else value for key, value in OPTIONS.get(name, {}).items()
    }
    if name == "ConstantWeighting":
        options = {"weights": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}
    weighting = getattr(aggregation, name)(**options)
    torch.manual_seed(4)
    for seed in range(4):
        found = surgery.coefficients(random_gramian(seed=seed))
        torch.testing.assert_close(found, weighting(random_gramian(seed=seed)), rtol=0, atol=0)
        assert found.dtype == torch.float64


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("num_rows", [3, 5])
def test_equal_rows_give_the_row(name: str, num_rows: int) -> None:
    row = torch.tensor([[1e-3, -2e-3]], dtype=torch.float64)
    surgery = make(name)
    for _ in range(3):  # 1e-3 is below a threshold of CAGrad's
        found = surgery(row.expand(num_rows, -1))
        torch.testing.assert_close(found, row[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["PCGradWeighting", "SumWeighting", "AlignedMTLWeighting"])
def test_the_scale_of_the_mean_divides_by_what_equal_rows_sum_to(name: str) -> None:
    total = 1 if name == "AlignedMTLWeighting" else 3
    expected = TorchJD(name, seed=1, scale="paper").coefficients(random_gramian()) / total
    torch.testing.assert_close(TorchJD(name, seed=1).coefficients(random_gramian()), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_in_the_scale_of_the_mean_every_weighting_has_degree_1(name: str) -> None:
    for factor in (1e-12, 100.0):
        expected = make(name).coefficients(random_gramian())
        torch.testing.assert_close(make(name).coefficients(factor * random_gramian()), expected, rtol=1e-6, atol=1e-9)


def test_draws_come_from_a_generator_of_its_own() -> None:
    before = torch.get_rng_state()
    surgery, other = TorchJD("RandomWeighting", seed=1), TorchJD("RandomWeighting", seed=2)
    drawn = [surgery.coefficients(random_gramian()) for _ in range(3)]
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], other.coefficients(random_gramian()))
    torch.manual_seed(77)
    again = TorchJD("RandomWeighting", seed=1)
    assert all(torch.equal(again.coefficients(random_gramian()), each) for each in drawn)


def test_the_scale_draws_nothing() -> None:
    paper, mean = TorchJD("PCGradWeighting", seed=1, scale="paper"), TorchJD("PCGradWeighting", seed=1)
    for seed in range(10):
        inner = random_gramian(6, seed)
        torch.testing.assert_close(mean.coefficients(inner), paper.coefficients(inner) / 6, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [*STATEFUL, "PCGradWeighting"])
def test_state_round_trips_bitwise(name: str) -> None:
    surgery, resumed = make(name, seed=0), make(name, seed=5)
    resumed.coefficients(random_gramian(2), [0, 1])
    for seed in range(4):
        surgery.coefficients(random_gramian(seed=seed), [0, 2, 3])
    state = surgery.state_dict()
    expected = [surgery.coefficients(random_gramian(seed=seed), [0, 2, 3]) for seed in range(4, 8)]
    resumed.load_state_dict(state)
    found = [resumed.coefficients(random_gramian(seed=seed), [0, 2, 3]) for seed in range(4, 8)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(isinstance(value, Tensor) for value in state["memory"].values())
    assert len(state["memory"]) == (0 if name == "PCGradWeighting" else 2 if name == "PCDWeighting" else 1)


def test_a_fresh_state_loads() -> None:
    surgery = TorchJD("GradVacWeighting", seed=3)
    surgery.load_state_dict(TorchJD("GradVacWeighting", seed=1).state_dict())
    expected = TorchJD("GradVacWeighting", seed=1).coefficients(random_gramian())
    assert torch.equal(surgery.coefficients(random_gramian()), expected)


@pytest.mark.parametrize("name", STATEFUL)
def test_what_it_remembers_is_never_another_tasks(name: str) -> None:
    surgery = make(name, seed=0)
    for seed in range(3):
        surgery.coefficients(random_gramian(seed=seed), [0, 1, 2])
    fresh = make(name, seed=0)
    fresh.load_state_dict({**fresh.state_dict(), "generator": surgery.state_dict()["generator"]})
    expected = fresh.coefficients(random_gramian(seed=9), [1, 2, 4])
    assert torch.equal(surgery.coefficients(random_gramian(seed=9), [1, 2, 4]), expected)


def test_a_list_is_a_value_for_each_task() -> None:
    surgery = TorchJD("ConstantWeighting", {"weights": [1.0, 2.0, 5.0]}, scale="paper")
    assert surgery.coefficients(random_gramian(2), [0, 2]).tolist() == [1.0, 5.0]
    preferring = TorchJD("AlignedMTLWeighting", {"pref_vector": [1.0, 0.0, 0.0], "scale_mode": "rmse"})
    assert preferring.coefficients(torch.eye(2), [0, 1]).tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("UPGrad", None, r"^weighting: must be a class of torchjd.aggregation, found 'UPGrad'; there are \['Aligned"),
        ("Weighting", None, r"^weighting: must be a class of torchjd.aggregation, found 'Weighting'; "),
        ("CRMOGMWeighting", None, r"^weighting: must work by coefficients .* put mtl.surgery.CRMOGM around "),
        ("ExcessMTLWeighting", None, r"^weighting: must work by coefficients .* whole gradients"),
        ("MGDAWeighting", {"epsilom": 1}, r"^options: must be those of MGDAWeighting, found \{'epsilom': 1\}; "),
        ("MGDAWeighting", {"epsilon": -1}, r"^options: must be those of MGDAWeighting, found \{'epsilon': -1\}; "),
    ],
)
def test_wrong_arguments_are_refused(name: str, options: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        TorchJD(name, options)
    assert "\n" not in str(caught.value)


def test_too_few_values_are_refused() -> None:
    surgery = TorchJD("ConstantWeighting", {"weights": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"^options: weights must have a value for each task, found 2; "):
        surgery.coefficients(random_gramian(), [0, 1, 2])


def test_weights_act() -> None:
    assert TorchJD("PCGradWeighting").weights_act == "yes"
    assert TorchJD("IMTLGWeighting").weights_act == "no"
    assert TorchJD("MGDAWeighting").weights_act == "reversed"
    assert TorchJD("AlignedMTLWeighting").weights_act == "partly"


def test_agrees_with_ours() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])  # one order only
    torch.testing.assert_close(TorchJD("PCGradWeighting")(rows), PCGrad()(rows))


def test_importing_the_package_does_not_import_torchjd() -> None:
    code = "import sys, mtl.surgery; sys.exit(any(name.split('.')[0] == 'torchjd' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
