"""Combined adapters against dense weights; the faults of peft's combinations are pinned down."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from mtl.handover.combining import METHODS, Combination, factors

PAIR = ["colours", "picks"]
RSLORA = ("per_task", "adapters.use_rslora=true", "adapters.private_lora_alpha=5")


def differences(folder):
    """The weight difference ``s B A`` of every layer, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    layers = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    return {layer: scale * tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"] for layer in layers}


def trimmed(matrix, density):
    kept = matrix.abs().flatten().argsort(descending=True)[: int(density * matrix.numel())]
    mask = torch.zeros(matrix.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view_as(matrix), matrix, 0.0)


def ties(matrices, weights, density):
    """TIES by its definition, place by place: trim, elect the sign of the sum, mean of those that have it."""
    parts = torch.stack([trimmed(matrix, density) for matrix in matrices])
    elected = torch.where(parts.sum(0) >= 0, 1.0, -1.0)
    agrees = parts.sign() == elected
    weighted = parts * torch.tensor(weights, dtype=parts.dtype)[:, None, None]
    return torch.where(agrees, weighted, 0.0).sum(0) / agrees.sum(0).clamp(min=1)


def combined(mtl, run, tmp_path, method, *options):
    mtl(
        *("export", run.folder, "--combine", method, "--tasks", ",".join(PAIR), "--name", "both"),
        *("--output", tmp_path / "both", *options),
    )
    return tmp_path / "both"


def relative(found, expected):
    error = sum((found[layer] - expected[layer]).square().sum() for layer in expected)
    return float((error / sum(value.square().sum() for value in expected.values())).sqrt())


@pytest.mark.parametrize("layout", [["shared_and_per_task"], RSLORA])
def test_the_sum_is_exact(trained, mtl, tmp_path, layout):
    run = trained(*layout)
    folder = combined(mtl, run, tmp_path, "sum", "--weights", "0.25,-2")
    first, second = (differences(run.folder / "adapters" / name) for name in PAIR)
    expected = {layer: 0.25 * first[layer] - 2 * second[layer] for layer in first}
    assert relative(differences(folder), expected) < 1e-6


@pytest.mark.parametrize("layout", [["shared_and_per_task"], RSLORA])
def test_ties_is_that_of_the_weight_differences(trained, mtl, tmp_path, layout):
    run = trained(*layout)
    options = ("--weights", "1,0.5", "--density", "0.3", "--rank", "99")
    folder = combined(mtl, run, tmp_path, "ties", *options)
    first, second = (differences(run.folder / "adapters" / name) for name in PAIR)
    expected = {layer: ties([first[layer], second[layer]], [1.0, 0.5], 0.3) for layer in first}
    assert relative(differences(folder), expected) < 1e-5


def test_a_lower_rank_leaves_out_what_the_card_says(trained, mtl, tmp_path):
    run = trained("shared_and_per_task")
    folder = combined(mtl, run, tmp_path, "ties", "--density", "0.3", "--rank", "4")
    first, second = (differences(run.folder / "adapters" / name) for name in PAIR)
    expected = {layer: ties([first[layer], second[layer]], [1.0, 1.0], 0.3) for layer in first}
    found = differences(folder)
    for layer, matrix in expected.items():
        assert torch.linalg.matrix_rank(found[layer], rtol=1e-4) <= 4
        best = torch.linalg.svdvals(matrix)[4:].square().sum().sqrt()  # Eckart-Young
        assert torch.linalg.norm(found[layer] - matrix) == pytest.approx(float(best), rel=1e-3)
    assert f"leaves out {relative(found, expected):.1%}" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_random_places_and_scales_them_up(trained, mtl, tmp_path, method):
    run = trained("per_task")
    before = torch.get_rng_state()
    folder = combined(mtl, run, tmp_path, method, "--density", "0.4", "--rank", "99", "--seed", "5")
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (differences(run.folder / "adapters" / name) for name in PAIR)
    num_kept = num_places = 0
    for layer, found in differences(folder).items():
        one, two = first[layer] / 0.4, second[layer] / 0.4
        elected = torch.where(one + two >= 0, 1.0, -1.0)
        both = one + two if method == "dare_linear" else torch.where(
            one.sign() == two.sign(), (one + two) / 2, torch.where(one.sign() == elected, one, two)
        )  # fmt: skip
        possible = torch.stack([torch.zeros_like(one), one, two, both])
        distance, chosen = (possible - found).abs().min(0)
        assert distance.max() < 1e-5 * possible.abs().max()
        num_kept += int((chosen != 0).sum())
        num_places += chosen.numel()
    assert num_kept / num_places == pytest.approx(1 - 0.6**2, abs=0.04)
    first_time = differences(folder)
    for seed, is_same in (("5", True), ("6", False)):
        combined(mtl, run, tmp_path, method, "--density", "0.4", "--rank", "99", "--seed", seed)
        assert (relative(differences(folder), first_time) < 1e-6) is is_same


def test_merged_combinations_leave_nothing_out(trained, mtl, tmp_path, tiny_folder):
    from transformers import AutoModelForCausalLM

    run = trained("shared_and_per_task")
    folder = combined(mtl, run, tmp_path, "ties", "--density", "0.3", "--format", "merged")
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    first, second = (differences(run.folder / "adapters" / name) for name in PAIR)
    for layer in first:
        name = layer.removeprefix("base_model.model.") + ".weight"
        expected = base[name].double() + ties([first[layer], second[layer]], [1.0, 1.0], 0.3)
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=1e-5)


def test_a_combined_export_is_for_all_of_its_tasks(trained, mtl, tmp_path):
    run = trained("shared_and_per_task")
    folder = combined(mtl, run, tmp_path, "sum", "--weights", "0.5,0.5")
    mtl("eval", folder)
    assert list(json.loads((folder / "eval-test.json").read_text())["tasks"]) == PAIR


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--combine", "sum", "--tasks", "colours", "--name", "x"], "needs at least two tasks"),
        (["--combine", "sum", "--tasks", "colours,picks"], "Add --name NAME"),
        (["--combine", "sum", "--tasks", "colours,picks", "--name", "sums"], "is one of the run's tasks"),
        (["--combine", "sum", "--tasks", "colours,picks", "--name", "a/b"], "must not hold '/'"),
        (["--combine", "sum", "--tasks", "colours,picks", "--name", "x", "--weights", "1"], "found 1 for 2 tasks"),
        (["--combine", "sum", "--tasks", "colours,picks", "--name", "x", "--weights", "1,a"], "must be numbers"),
        (["--combine", "mean", "--tasks", "colours,picks", "--name", "x"], "must be one of sum, ties"),
        (["--combine", "ties", "--tasks", "colours,picks", "--name", "x", "--density", "0"], "must be above 0"),
        (["--combine", "sum", "--tasks", "colours,picks", "--name", "x", "--rank", "3"], "exact at the sum of ranks"),
        (["--task", "colours", "--density", "0.5"], "is for --combine only"),
    ],
)
def test_what_can_not_be_combined(trained, mtl, options, message):
    assert message in mtl("export", trained("per_task").folder, *options, code=2)


def test_doras_are_not_combined(trained, mtl, tmp_path):
    error = mtl(
        *("export", trained("dora").folder, "--combine", "sum", "--tasks", "colours,picks", "--name", "x"),
        *("--output", tmp_path / "x"),
        code=2,
    )
    assert "is a DoRA" in error
    assert not list(tmp_path.iterdir())


def test_the_faults_of_peft_that_this_avoids_are_still_there(trained, tiny_folder):
    """If this fails, peft has changed, and the way around may be shorter."""
    from transformers import AutoModelForCausalLM

    from mtl.handover.loading import add_adapter

    run = trained("per_task")
    model = add_adapter(AutoModelForCausalLM.from_pretrained(tiny_folder), run.folder / "adapters" / "colours", "one")
    add_adapter(model, run.folder / "adapters" / "picks", "two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "linear", combination_type="linear")
        model.base_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "cat", combination_type="cat")
    [layer] = [m for name, m in model.named_modules() if name.endswith("layers.0.self_attn.q_proj")]
    true = layer.get_delta_weight("one") + layer.get_delta_weight("two")
    torch.testing.assert_close(layer.get_delta_weight("cat"), true)
    assert torch.linalg.norm(layer.get_delta_weight("linear") - true) > 0.3 * torch.linalg.norm(true)


@pytest.mark.parametrize(("rank", "shape"), [(4, (5, 3)), (3, (40, 30)), (6, (120, 100))])  # the last one randomized
def test_factors_are_the_best_of_their_rank(rank, shape):
    before = torch.get_rng_state()
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.rand(shape[1]) ** 4
    after_rand = torch.get_rng_state()
    a, b = factors(matrix, rank)
    assert torch.equal(torch.get_rng_state(), after_rand)
    torch.set_rng_state(before)
    assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
    best = torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt()
    error = torch.linalg.norm((b @ a).double() - matrix)
    assert error == pytest.approx(float(best), rel=2e-3, abs=1e-5)
    found = torch.linalg.norm(matrix.double()) ** 2 - torch.linalg.norm(b.double()) ** 2
    assert found == pytest.approx(float(error) ** 2, rel=2e-2, abs=1e-3)


def test_every_method_has_a_test_and_a_line_of_help():
    from mtl.usage import EXPORT

    assert set(METHODS) == {"sum", "ties", "dare_linear", "dare_ties"}
    assert all(method in EXPORT for method in METHODS)
    assert Combination("sum", [1.0, 1.0]).density == 0.5
