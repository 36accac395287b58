"""Groups, a shared A, experts, rsLoRA and DoRA: derivatives against differences, exports against plain peft."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from mtl.data.batching import Batch
from mtl.data.tokenized import TokenizedExample
from mtl.distributed import Distributed
from mtl.errors import UserError
from mtl.gradients import Backward, group_sizes
from mtl.models import ExpertsLayout, GroupLayout, LoraLayout, SharedALayout
from mtl.models.precision import keep_float64

NAMES = ["a", "b", "c", "d"]
GROUPS = {"left": ["a", "b"], "right": ["b", "c"]}
LAYOUTS = {
    "experts": lambda model, **o: ExpertsLayout(model, 4, num_experts=3, lora_r=2, **o),
    "one_expert": lambda model, **o: ExpertsLayout(model, 4, num_experts=1, lora_r=2, **o),
    "shared_a": lambda model, **o: SharedALayout(model, 4, lora_r=3, lora_alpha=5, **o),
    "groups": lambda model, **o: GroupLayout(model, 4, NAMES, groups=GROUPS, group_lora_r=2, lora_r=3, **o),
    "groups_and_own": lambda model, **o: GroupLayout(
        model, 4, NAMES, groups=GROUPS, group_lora_r=2, group_lora_alpha=3, lora_r=0, private_lora_r=2, **o
    ),
    "own_modules": lambda model, **o: LoraLayout(
        model,
        4,
        lora_r=2,
        private_lora_r=3,
        target_modules=["q_proj", "up_proj"],
        private_target_modules=["up_proj", "o_proj"],
        **o,
    ),
    "two_alphas": lambda model, **o: LoraLayout(model, 4, lora_r=2, private_lora_r=3, private_lora_alpha=4, **o),
}


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).double().eval()
    keep_float64(model)
    return model


def with_layout(name, **options):
    model = make_model()
    layout = LAYOUTS[name](model, lora_dropout=0.0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layout.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model, layout


def random_batch(tasks=(0, 0, 1, 2, 2, 3)):
    generator = np.random.default_rng(0)
    examples = []
    for task in tasks:
        length = int(generator.integers(4, 20))
        ids = generator.integers(0, 60, length).astype(np.int32)
        examples.append((task, TokenizedExample(ids, np.arange(length) >= length // 2)))
    return Batch(examples, 4)


def make_backward(model, layout, *, routes=True, max_tokens=60):
    backward = Backward(model, layout, Distributed(Accelerator(cpu=True)), max_tokens=max_tokens, packing=True, seed=0)
    backward.routes = routes and backward.routes
    return backward


def difference(backward, batch, parameters, direction_N, apart=True):
    """The derivative of every task's loss along a direction, by a central difference."""
    found, size = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, part in zip(parameters, direction_N.split([p.numel() for p in parameters]), strict=True):
                parameter.add_(sign * size * part.view_as(parameter))
        found.append(backward.losses(batch, step=0, apart=apart))
        with torch.no_grad():
            for parameter, part in zip(parameters, direction_N.split([p.numel() for p in parameters]), strict=True):
                parameter.sub_(sign * size * part.view_as(parameter))
    return (found[0] - found[1]) / (2 * size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_and_private_gradients_are_the_derivatives(name):
    model, layout = with_layout(name)
    backward, batch = make_backward(model, layout), random_batch()
    assert backward.routes
    gradients = backward(batch, torch.ones(4), step=0, apart=True)
    rows, private = gradients.shared_RN.clone(), [flat.clone() for flat in gradients.private]
    generator = torch.Generator().manual_seed(2)
    shared = layout.shared_parameters()
    for _ in range(2 if shared else 0):
        direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
        torch.testing.assert_close(
            rows @ direction, difference(backward, batch, shared, direction), rtol=1e-6, atol=1e-7
        )
    for task, flat in enumerate(private):
        own = layout.private_parameters(task)
        if own:
            direction = torch.randn(len(flat), generator=generator, dtype=torch.float64)
            expected = torch.zeros(4, dtype=torch.float64)
            expected[task] = flat @ direction
            torch.testing.assert_close(difference(backward, batch, own, direction), expected, rtol=1e-6, atol=1e-7)
    assert len(private[0]) or name == "groups"
    mixed = backward(batch, torch.ones(4), step=0, apart=False)
    torch.testing.assert_close(mixed.shared_RN[0], rows.sum(0), rtol=1e-9, atol=1e-12)
    for flat, expected in zip(mixed.private, private, strict=True):
        torch.testing.assert_close(flat, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_routed_and_plain_forwards_agree(name):
    model, layout = with_layout(name)
    batch = random_batch()
    routed = make_backward(model, layout).losses(batch, step=0, apart=True)
    plain = make_backward(model, layout, routes=False).losses(batch, step=0, apart=True)
    torch.testing.assert_close(routed, plain, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["shared_a", "groups", "groups_and_own"])
def test_rows_out_of_a_pass_for_each_task_are_the_same(name):
    model, layout = with_layout(name)
    batch, found = random_batch(), []
    for routes in (True, False):
        gradients = make_backward(model, layout, routes=routes)(batch, torch.ones(4), step=0, apart=True)
        found.append(torch.cat([gradients.shared_RN.flatten(), *gradients.private]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_exports_are_plain_adapters_with_the_same_logits(name, rslora, tmp_path):
    model, layout = with_layout(name, use_rslora=rslora)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits = []
        for task in range(4):
            with layout.activate(task):
                logits.append(model(ids).logits)
        assert name == "one_expert" or not torch.allclose(logits[0], logits[2])
        layout.export(tmp_path, NAMES)
        for task, expected in enumerate(logits):
            plain = PeftModel.from_pretrained(make_model(), tmp_path / NAMES[task]).eval()
            torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-9, atol=1e-9)
            with layout.activate(task):  # and the run goes on as it was
                assert torch.equal(model(ids).logits, expected)
    assert all(parameter.requires_grad for parameter in layout.parameters())


def test_a_group_without_a_present_task_is_idle():
    model, layout = with_layout("groups")
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    for tasks, groups in ([0, 3], {"group1"}), ([3], {"group0", "group1"}), ([1], set()):
        idle = layout.idle_parameters(tasks)
        assert {name for p in idle for name in named[id(p)].split(".") if name.startswith("group")} == groups
        assert len(idle) == len(groups) * 2 * 14


def test_a_shared_a_is_one_parameter_and_begins_as_one():
    layout = SharedALayout(make_model(), 4, lora_r=3)
    assert len(layout.shared_parameters()) == 14
    assert all(len(layout.private_parameters(task)) == 14 for task in range(4))
    assert len({id(parameter) for parameter in layout.parameters()}) == 5 * 14


def test_experts_begin_mixed_evenly_and_apart():
    layout = ExpertsLayout(make_model(), 2, num_experts=3, lora_r=2)
    assert all(not gate.any() for task in range(2) for gate in layout.private_parameters(task))
    first = [p for name, p in layout.named_parameters().items() if "lora_A" in name][:3]
    assert not torch.equal(first[0], first[1])


def test_dora_trains_without_routes_and_exports(tmp_path):
    model = make_model()
    layout = LoraLayout(model, 2, lora_r=0, private_lora_r=2, use_dora=True, lora_dropout=0.0)
    assert not layout.can_route
    with torch.no_grad():
        for parameter in layout.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    batch = Batch([(task % 2, example) for task, example in random_batch().examples], 2)
    backward = make_backward(model, layout)
    assert not backward.routes
    gradients = backward(batch, torch.ones(2), step=0, apart=True)
    own = layout.private_parameters(1)
    assert len(own) == 3 * 14, "A, B and the norms"
    # peft holds the norm in the denominator fixed in the backward, as the paper says: B alone has an exact derivative
    # only through the norms' own parameters.
    magnitudes = [p for name, p in layout.named_parameters().items() if "magnitude" in name and "task1" in name]
    direction = torch.randn(sum(p.numel() for p in magnitudes), generator=torch.Generator().manual_seed(4)).double()
    sizes = [p.numel() for p in own]
    at = {id(p): part for p, part in zip(own, gradients.private[1].split(sizes), strict=True)}
    slope = torch.cat([at[id(p)] for p in magnitudes]) @ direction
    assert float(difference(backward, batch, magnitudes, direction)[1]) == pytest.approx(float(slope), rel=1e-6)
    layout.export(tmp_path, ["a", "b"])
    ids = torch.arange(10)[None]
    with torch.no_grad(), layout.activate(1):
        expected = model(ids).logits
        plain = PeftModel.from_pretrained(make_model(), tmp_path / "b").eval()
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_dora_of_groups_that_share_no_task_exports(tmp_path):
    model, ids = make_model(), torch.arange(10)[None]
    groups = {"left": ["a", "b"], "right": ["c", "d"]}
    layout = GroupLayout(model, 4, NAMES, groups=groups, group_lora_r=2, lora_r=0, use_dora=True, lora_dropout=0.0)
    with torch.no_grad():
        for parameter in layout.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    gradients = make_backward(model, layout)(random_batch(), torch.ones(4), step=0, apart=True)
    assert gradients.shared_RN.any(dim=1).all()
    assert not (gradients.shared_RN[0] * gradients.shared_RN[2]).any(), "of other groups"
    layout.export(tmp_path, NAMES)
    with torch.no_grad(), layout.activate(2):
        plain = PeftModel.from_pretrained(make_model(), tmp_path / "c").eval()
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: LoraLayout(m, 2, lora_r=2, private_lora_r=2, use_dora=True), "use_dora=true with lora_r=2"),
        (lambda m: LoraLayout(m, 2, init_lora_weights="pissa"), "init_lora_weights=pissa: must be true, gaussian"),
        (lambda m: LoraLayout(m, 2, lora_r=3, init_lora_weights="orthogonal"), "orthogonal: needs even ranks, found 3"),
        (lambda m: LoraLayout(m, 2, lora_dropout=1.5), r"lora_dropout=1.5: must be a share in \[0, 1\)"),
        (lambda m: ExpertsLayout(m, 2, num_experts=0), "num_experts=0"),
        (lambda m: ExpertsLayout(m, 2, target_modules=["embed_tokens"]), "experts need layers that are linear"),
        (lambda m: SharedALayout(m, 2, target_modules=["embed_tokens"]), "can't share its A"),
        (lambda m: SharedALayout(m, 2, lora_r=0), "lora_r=0"),
        (lambda m: GroupLayout(m, 4, NAMES, groups=GROUPS, use_dora=True), "use_dora=true: task a has 2 adapters"),
        (lambda m: GroupLayout(m, 4, NAMES, groups={}), "must name at least one group"),
        (lambda m: GroupLayout(m, 4, NAMES, groups={"x": "a"}), "groups.x=a: must be a list"),
        (lambda m: GroupLayout(m, 4, NAMES, groups={"x": ["e"]}), "e is not a task of the run"),
        (lambda m: GroupLayout(m, 4, NAMES, groups={"x": ["a"]}, lora_r=0), "task b is in no group"),
    ],
)
def test_what_can_not_be_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make(make_model())


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_other_initial_values_leave_the_base_model_alone(init):
    base, model = make_model(), make_model()
    LoraLayout(model, 2, lora_r=4, private_lora_r=2, init_lora_weights=init)
    for name, parameter in base.named_parameters():
        name = name.replace("proj.weight", "proj.base_layer.weight")
        assert torch.equal(dict(model.named_parameters())[name], parameter)


OF_EVEN_RANKS = {
    "experts": lambda model, init: ExpertsLayout(model, 4, num_experts=2, lora_r=2, init_lora_weights=init),
    "shared_a": lambda model, init: SharedALayout(model, 4, lora_r=4, init_lora_weights=init),
    "groups": lambda model, init: GroupLayout(
        model, 4, NAMES, groups=GROUPS, group_lora_r=2, lora_r=4, private_lora_r=2, init_lora_weights=init
    ),
    "both": lambda model, init: LoraLayout(model, 4, lora_r=4, private_lora_r=2, init_lora_weights=init),
}


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("name", OF_EVEN_RANKS)
def test_every_task_begins_as_the_base_model(name, init):
    """Though an orthogonal B is not 0: its product with the A that was drawn with it is."""
    model, ids = make_model(), torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        layout = OF_EVEN_RANKS[name](model, init)
        for task in range(4):
            with layout.activate(task):
                torch.testing.assert_close(model(ids).logits, expected, rtol=1e-6, atol=1e-6)
    assert any(p.any() for key, p in layout.named_parameters().items() if "lora_B" in key) == (init == "orthogonal")


def test_each_kind_of_adapter_has_its_own_dropout_layers_and_initial_values():
    model = make_model()
    GroupLayout(
        model,
        4,
        NAMES,
        groups=GROUPS,
        group_lora_r=2,
        lora_r=3,
        private_lora_r=2,
        lora_dropout=0.1,
        group_lora_dropout=0.2,
        private_lora_dropout=0.0,
        target_modules=["q_proj", "up_proj"],
        group_target_modules=["up_proj"],
        private_target_modules=["o_proj"],
        private_init_lora_weights="orthogonal",
    )
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    found = {
        name: set(layer.lora_A)
        for name, layer in (("q", attention.q_proj), ("o", attention.o_proj), ("up", mlp.up_proj))
    }
    private = {f"task{task}" for task in range(4)}
    assert found == {"q": {"shared"}, "o": private, "up": {"shared", "group0", "group1"}}
    assert mlp.up_proj.lora_dropout["shared"].p == 0.1
    assert mlp.up_proj.lora_dropout["group1"].p == 0.2
    assert not isinstance(attention.o_proj.lora_dropout["task2"], torch.nn.Dropout)
    assert not attention.q_proj.lora_B["shared"].weight.any()
    assert attention.o_proj.lora_B["task2"].weight.any()


def test_another_dropout_for_the_private_adapters_is_a_pass_for_each_task(tmp_path):
    model = make_model()
    layout = LoraLayout(model, 4, lora_r=2, private_lora_r=2, lora_dropout=0.0, private_lora_dropout=0.5)
    assert not layout.can_route
    with torch.no_grad():
        for parameter in layout.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    model.train()
    losses = [make_backward(model, layout).losses(random_batch(), step=step, apart=True) for step in (0, 0, 1)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2]), "other masks"
    model.eval()
    ids = torch.arange(10)[None]
    layout.export(tmp_path, NAMES)
    with torch.no_grad(), layout.activate(1):
        plain = PeftModel.from_pretrained(make_model(), tmp_path / "b").eval()
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("granularity", "number"), [("layer", 2), ("module", 14)])
def test_columns_fall_into_groups_by_layer_and_module(name, granularity, number):
    _, layout = with_layout(name)
    if name != "own_modules":  # its shared adapter is on fewer modules
        sizes = group_sizes(layout, granularity)
        assert len(sizes) == number
        assert sum(sizes) == sum(parameter.numel() for parameter in layout.shared_parameters())
