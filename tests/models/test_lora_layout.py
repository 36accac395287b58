"""Layouts: who trains what, switching without side effects, and export to plain peft."""

import json

import pytest
import torch
from peft import PeftModel

from mtl.errors import UserError
from mtl.models import FullLayout, LoraLayout
from mtl.models.lora_config import linear_layer_names

IDS = torch.arange(24).view(2, 12) * 7 % 258
NAMES = ["plain", "情感 🙂", "with.dots"]


def randomized(model, **ranks):
    layout = LoraLayout(model, 3, lora_dropout=0.0, **ranks)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layout.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return layout


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "ranks", [{"lora_r": 4}, {"lora_r": 0, "private_lora_r": 3}, {"lora_r": 4, "private_lora_r": 3}]
)
def test_each_tasks_adapters_act_alone(make_model, ranks):
    model = make_model()
    before = logits(model)
    layout = randomized(model, **ranks)
    assert torch.equal(logits(model), before), "without a task the base model must act"
    outputs = []
    for task in range(3):
        with layout.activate(task):
            outputs.append(logits(model))
            with layout.activate(None):
                assert torch.equal(logits(model), before)
            assert torch.equal(logits(model), outputs[-1]), "an inner block must leave the outer one as it was"
    assert torch.equal(logits(model), before)
    differ = ranks.get("private_lora_r", 0) > 0
    assert torch.equal(outputs[0], outputs[1]) != differ


def test_the_sum_is_that_of_the_definition(make_model):
    """y = W0 x + s_shared B A x + s_t B_t A_t x, computed by hand on one layer."""
    model = make_model()
    layout = randomized(model, lora_r=4, private_lora_r=3, lora_alpha=8, private_lora_alpha=5)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 16, dtype=torch.float64)

    def delta(adapter, scale):
        return scale * x @ layer.lora_A[adapter].weight.T @ layer.lora_B[adapter].weight.T

    with layout.activate(2):
        found = layer(x)
    expected = x @ layer.base_layer.weight.T + delta("shared", 8 / 4) + delta("task2", 5 / 3)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_parameters_are_shared_or_private_and_all_train(make_model):
    layout = LoraLayout(make_model(), 3, lora_r=4, private_lora_r=3)
    shared, private = layout.shared_parameters(), [layout.private_parameters(t) for t in range(3)]
    assert [id(p) for p in layout.parameters()] == [id(p) for group in (shared, *private) for p in group]
    assert all(p.requires_grad for p in layout.parameters())
    assert {id(p) for p in layout.named_parameters().values()} == {id(p) for p in layout.parameters()}
    assert all(not p.requires_grad for name, p in layout.model.named_parameters() if "lora" not in name)
    with layout.activate(1):
        layout.model(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for p in (*shared, *private[1]))
    assert all(p.grad is None for p in (*private[0], *private[2]))


def test_initial_values_come_from_the_seed_and_touch_no_generator(make_model):
    state = torch.get_rng_state()
    a, b, c = (LoraLayout(make_model(), 2, lora_r=4, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))
    torch.set_rng_state(state)
    LoraLayout(make_model(seed=0), 2, lora_r=4, seed=5)
    expected = torch.Generator()
    torch.manual_seed(0)
    make_model()
    expected.set_state(torch.get_rng_state())
    LoraLayout(make_model(), 2, lora_r=4, seed=6)
    assert torch.equal(torch.get_rng_state(), expected.get_state())


@pytest.mark.parametrize(
    "ranks", [{"lora_r": 4}, {"lora_r": 0, "private_lora_r": 3}, {"lora_r": 4, "private_lora_r": 3}]
)
def test_exported_adapters_give_the_same_logits_in_plain_peft(tmp_path, make_model, ranks):
    layout = randomized(make_model(), **ranks)
    expected = []
    for task in range(3):
        with layout.activate(task):
            expected.append(logits(layout.model))
    layout.export(tmp_path / "adapters", NAMES)
    found = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert found == {*NAMES, *(["shared"] if ranks["lora_r"] else [])}
    for task, name in enumerate(NAMES):
        folder = tmp_path / "adapters" / name
        loaded = PeftModel.from_pretrained(make_model(), folder).eval()
        assert torch.allclose(logits(loaded), expected[task], rtol=0, atol=1e-10)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["r"] == ranks["lora_r"] + ranks.get("private_lora_r", 0)
        assert config["target_modules"] == sorted(config["target_modules"])


def test_export_leaves_the_layout_trainable(tmp_path, make_model):
    layout = randomized(make_model(), lora_r=4, private_lora_r=3)
    with layout.activate(0):
        expected = logits(layout.model)
    layout.export(tmp_path / "adapters", NAMES)
    assert all(p.requires_grad for p in layout.parameters())
    assert set(layout.named_parameters()) == set(
        LoraLayout(make_model(), 3, lora_r=4, private_lora_r=3).named_parameters()
    )
    with layout.activate(0):
        assert torch.equal(logits(layout.model), expected)


def test_dropout_follows_the_mode_that_the_model_is_in(make_model):
    model = make_model().eval()
    layout = LoraLayout(model, 1, lora_r=4, private_lora_r=2, lora_dropout=0.5)
    with torch.no_grad():
        for parameter in layout.parameters():
            parameter.fill_(0.1)
    with layout.activate(0):
        assert torch.equal(logits(model), logits(model))
    with layout.joined(), layout.activate(0):
        assert torch.equal(logits(model), logits(model))


def test_full_layout_trains_in_float32_where_the_weights_are_half(make_model):
    assert {p.dtype for p in FullLayout(make_model(torch.bfloat16), 1).parameters()} == {torch.float32}
    assert {p.dtype for p in FullLayout(make_model(torch.float64), 1).parameters()} == {torch.float64}


def test_layers_are_named_explicitly_without_the_output(make_model):
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert linear_layer_names(make_model()) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_r": 0}, "at least one rank must be positive"),
        ({"lora_r": -1, "private_lora_r": 2}, "none negative"),
        ({"target_modules": ["nothing"]}, "adapters.target_modules"),
    ],
)
def test_bad_layouts_are_refused(make_model, arguments, message):
    with pytest.raises(UserError, match=message):
        LoraLayout(make_model(), 2, **arguments)


def test_full_layout_trains_everything_and_exports_a_model(tmp_path, make_model):
    from transformers import AutoModelForCausalLM

    model = make_model(torch.float32)
    model.requires_grad_(False)
    layout = FullLayout(model, 2)
    assert all(p.requires_grad for p in model.parameters())
    assert layout.private_parameters(0) == []
    layout.export(tmp_path / "adapters", ["a", "b"])
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()), logits(model))
    assert not (tmp_path / "adapters").exists()


def test_joined_adapters_are_bit_for_bit_what_is_exported(tmp_path, make_model):
    """In float32 the order of a sum shows: what is evaluated on test data must be what a user deploys."""
    layout = randomized(make_model(torch.float32), lora_r=4, private_lora_r=3)
    layout.export(tmp_path / "adapters", NAMES)
    before = layout.named_parameters().keys()
    for task, name in enumerate(NAMES):
        with layout.activate(task):
            separate = logits(layout.model)
        with layout.joined(), layout.activate(task):
            joined = logits(layout.model)
        loaded = PeftModel.from_pretrained(make_model(torch.float32), tmp_path / "adapters" / name).eval()
        assert torch.equal(logits(loaded), joined)
        assert torch.allclose(separate, joined, rtol=0, atol=1e-4)
        with layout.activate(task):
            assert torch.equal(logits(layout.model), separate)
    assert layout.named_parameters().keys() == before
    assert all(p.requires_grad for p in layout.parameters())
