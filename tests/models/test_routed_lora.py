"""One forward of several tasks, each through its own adapters, against peft's own layers, one task at a time."""

import copy
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from mtl.data.batching import Batch
from mtl.data.tokenized import TokenizedExample
from mtl.distributed import Distributed
from mtl.gradients import Backward, routing_is_exact
from mtl.interfaces import Segment
from mtl.models import FullLayout, LoraLayout
from mtl.models.lora import RoutedLinear, add_to_layers, dropout_mask, round_rate, tuner_layers
from mtl.models.precision import keep_float64
from mtl.models.routes import Target, Targets, make_blocks

TASKS = 4
LAYOUTS = {
    "shared": {"lora_r": 3},
    "per_task": {"lora_r": 0, "private_lora_r": 2},
    "shared_and_per_task": {"lora_r": 3, "private_lora_r": 2, "private_lora_alpha": 7},
}
SMALL = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "llama": {**SMALL, **WIDTHS, "num_key_value_heads": 1},
    "qwen2": {**SMALL, **WIDTHS, "num_key_value_heads": 1},  # biases
    "gpt2": {**SMALL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},  # Conv1D
    "phi3": {**SMALL, **WIDTHS, "num_key_value_heads": 2},  # fused projections
    "gemma3_text": {**SMALL, **WIDTHS, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    "mixtral": {**SMALL, **WIDTHS, "num_key_value_heads": 1, "num_local_experts": 4},  # experts
    "gpt_neox": {**SMALL, **WIDTHS},  # attention and feed-forward side by side
}


def family(name, dtype=torch.float64):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **FAMILIES[name], initializer_range=0.2)
    config.attention_dropout = config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if dtype == torch.float64:
        keep_float64(model)
    return model


def with_layout(model, *, dropout=0.0, size=0.3, **ranks):
    layout = LoraLayout(model, TASKS, lora_dropout=dropout, **ranks)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layout.parameters():  # B starts at 0, which would hide A and the private adapters
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size)
    return layout


def random_batch(seed=0, counts=(3, 1, 0, 4)):
    generator = np.random.default_rng(seed)
    examples = []
    for task, count in enumerate(counts):
        for _ in range(count):
            length = int(generator.integers(3, 30))
            ids = generator.integers(0, 258, length).astype(np.int32)
            examples.append((task, TokenizedExample(ids, np.arange(length) >= length // 2)))
    order = generator.permutation(len(examples))
    return Batch([examples[i] for i in order], TASKS)


def gradients(model, layout, batch, *, routes, max_tokens=10_000, packing=True, apart=True, step=0):
    distributed = Distributed(Accelerator(cpu=True))
    backward = Backward(model, layout, distributed, max_tokens=max_tokens, packing=packing, seed=0)
    assert backward.routes, "the layout should route, or nothing is tested"
    backward.routes = routes
    scale_T = torch.tensor([0.3, 2.0, 1.0, 0.7], dtype=torch.float64)
    found = backward(batch, scale_T, step=step, apart=apart)
    return found.losses_M, torch.cat([found.shared_RN.flatten(), *found.private])


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_rows_and_private_gradients_equal_those_of_a_pass_for_each_task(name, layout_name):
    dtype, tolerance = (torch.float32, 1e-5) if name == "mixtral" else (torch.float64, 1e-9)  # experts know no float64
    model = family(name, dtype)
    layout = with_layout(model, size=0.05 if name == "mixtral" else 0.3, **LAYOUTS[layout_name])
    batch = random_batch()
    losses, expected = gradients(model, layout, batch, routes=False, packing=False, max_tokens=1)
    for packing in (False, True):
        for max_tokens in (40, 10_000):
            for apart in (True, False):
                found_losses, found = gradients(
                    model, layout, batch, routes=True, packing=packing, max_tokens=max_tokens, apart=apart
                )
                if apart:
                    assert relative(found, expected) < tolerance, (packing, max_tokens)
                else:
                    num_shared = sum(p.numel() for p in layout.shared_parameters())
                    rows = expected[: 3 * num_shared].view(3, num_shared)
                    mixed = torch.cat([rows.sum(0), expected[3 * num_shared :]])
                    assert relative(found, mixed) < tolerance, (packing, max_tokens)
                assert torch.allclose(found_losses, losses, rtol=tolerance, atol=0)


def routed_and_alone(dtype, autocast=False):
    """Rows out of one pass and out of a pass for each task, both as far from those in float64 as they are."""
    found = []
    for routes, each in ((False, torch.float64), (True, dtype), (False, dtype)):
        model = family("llama", each)
        layout = with_layout(model, size=0.05, **LAYOUTS["shared_and_per_task"])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and each != torch.float64):
            found.append(gradients(model, layout, random_batch(), routes=routes)[1])
    exact, routed, alone = found
    return routed.dtype, relative(routed, exact), relative(alone, exact)


def test_float32_rounds_no_more_than_peft_does():
    dtype, routed, alone = routed_and_alone(torch.float32)
    assert dtype == torch.float32
    assert routed < min(1e-5, 3 * alone)


@pytest.mark.parametrize(("base", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_half_precision_rounds_no_more_than_peft_does(base, autocast):
    dtype, routed, alone = routed_and_alone(base, autocast)
    assert dtype == torch.float32, "sums must be in the dtype of the adapters"
    assert routed < 1.5 * alone < 0.15


def test_gradient_checkpointing_changes_nothing_with_dropout():
    found = []
    for checkpointing in (False, True):
        model = family("llama", torch.float32)
        layout = with_layout(model, dropout=0.3, **LAYOUTS["shared_and_per_task"])
        model.train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(gradients(model, layout, random_batch(), routes=True)[1])
    assert relative(found[1], found[0]) < 1e-6


def test_dropout_belongs_to_the_step_and_leaves_the_expectation():
    model = family("llama")
    layout = with_layout(model, dropout=0.0, **LAYOUTS["shared"])
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, RoutedLinear)
    layer.lora_dropout["shared"] = torch.nn.Dropout(0.25)
    x = torch.randn(40, 16, dtype=torch.float64)
    gradient_1N = torch.zeros(1, sum(p.numel() for p in layout.shared_parameters()), dtype=torch.float64)

    def output(seed):
        torch.manual_seed(seed)
        with layout.route([Segment(0, 0, 40)], gradient_1N, {0: 0}, {0: torch.empty(0)}), torch.no_grad():
            return layer(x)

    layer.train()
    assert torch.equal(output(3), output(3))
    assert not torch.equal(output(3), output(4))
    mean = torch.stack([output(seed) for seed in range(2000)]).mean(0)
    layer.eval()
    expected = output(0)
    base = layer.base_layer(x)
    assert relative(mean - base, expected - base) < 0.05


def test_the_gradient_of_a_layer_with_dropout_is_autograds():
    model = family("llama")
    layout = with_layout(model, dropout=0.4, **LAYOUTS["shared_and_per_task"])
    layer = model.model.layers[1].self_attn.o_proj.train()
    x = torch.randn(3, 4, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 16, dtype=torch.float64)
    segments = [Segment(2, 0, 5), Segment(0, 5, 9), Segment(2, 9, 12)]
    num_shared = sum(p.numel() for p in layout.shared_parameters())
    num_private = sum(p.numel() for p in layout.private_parameters(0))
    shared_RN = torch.zeros(2, num_shared, dtype=torch.float64)
    private = {task: torch.zeros(num_private, dtype=torch.float64) for task in (0, 2)}
    torch.manual_seed(7)
    with layout.route(segments, shared_RN, {0: 0, 2: 1}, private):
        y = layer(x)
        (y * weight).sum().backward()
    found_x, x.grad = x.grad, None

    torch.manual_seed(7)
    rate = round_rate(0.4)
    dropped = x * dropout_mask(x.reshape(12, 16), rate).view(3, 4, 16) / (1 - rate)
    tasks = torch.tensor([2] * 5 + [0] * 4 + [2] * 3).view(3, 4)
    expected_y = layer.base_layer(x)
    for adapter, acts in (("shared", tasks >= 0), ("task0", tasks == 0), ("task2", tasks == 2)):
        product = dropped @ layer.lora_A[adapter].weight.T @ layer.lora_B[adapter].weight.T * layer.scaling[adapter]
        expected_y = expected_y + product * acts[..., None]
    assert torch.allclose(y, expected_y, rtol=1e-12, atol=1e-12)
    for task, row in ((0, 0), (2, 1)):
        shared = layer.lora_A["shared"].weight, layer.lora_B["shared"].weight
        loss = (expected_y * weight)[tasks == task].sum()
        for parameter, gradient in zip(shared, torch.autograd.grad(loss, shared, retain_graph=True), strict=True):
            start = layer.starts[id(parameter)]
            found = shared_RN[row, start : start + parameter.numel()].view_as(parameter)
            assert relative(found, gradient) < 1e-12
    (expected_y * weight).sum().backward()
    assert relative(found_x, x.grad) < 1e-12
    own = layer.lora_A["task2"].weight
    start = layer.starts[id(own)]
    assert relative(private[2][start : start + own.numel()].view_as(own), own.grad) < 1e-12


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.999])
def test_the_mask_keeps_its_share(rate):
    torch.manual_seed(0)
    mask = dropout_mask(torch.empty(1001, 777), round_rate(rate))
    num = mask.numel()
    assert mask.shape == (1001, 777)
    assert abs(int((~mask).sum()) - num * rate) < 5 * (num * rate * (1 - rate)) ** 0.5
    # Neighbours, and numbers out of one draw of the generator, are independent.
    for lag in (1, 2, 3, 4, 777):
        both = float((~mask.flatten()[lag:] & ~mask.flatten()[:-lag]).double().mean())
        assert abs(both - rate**2) < 5 * (rate**2 * (1 - rate**2) / num) ** 0.5


def test_parameters_and_their_hooks_stay_out_of_it():
    model = family("llama")
    layout = with_layout(model, **LAYOUTS["shared_and_per_task"])
    called = []
    for parameter in layout.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
        parameter.register_hook(called.append)
    gradients(model, layout, random_batch(), routes=True)
    assert not called
    assert all(parameter.grad is None for parameter in layout.parameters())


def test_neighbours_with_the_same_targets_are_joined():
    segments = [Segment(0, 0, 4), Segment(1, 4, 6), Segment(1, 6, 9), Segment(0, 12, 15), Segment(2, 15, 20)]
    row, other = torch.zeros(2, 1)
    targets = {
        task: Targets([Target(adapter, gradient, gradient)])
        for task, (adapter, gradient) in enumerate([("shared", row), ("shared", other), ("own", row)])
    }
    blocks = make_blocks(segments, targets)
    assert [(block.targets.key, block.positions) for block in blocks] == [
        (("shared",), slice(0, 9)),
        (("shared",), slice(12, 15)),
        (("own",), slice(15, 20)),
    ]
    assert [(span.start, span.stop) for span in blocks[0].spans] == [(0, 4), (4, 9)]
    assert [span.targets.adapters[0].a_gradient_N is other for span in blocks[0].spans] == [False, True]
    (block,) = make_blocks(segments[:3], dict.fromkeys((0, 1), targets[0]))
    assert [(span.start, span.stop) for span in block.spans] == [(0, 9)]


def test_layers_that_see_other_positions_are_found_out(monkeypatch):
    model = family("llama")
    layout = with_layout(model, **LAYOUTS["shared_and_per_task"])
    backward = Backward(model, layout, Distributed(Accelerator(cpu=True)), max_tokens=100, packing=True, seed=0)
    assert routing_is_exact(backward, TASKS)
    up_proj = model.model.layers[0].mlp.up_proj
    forward = up_proj.forward
    # Backwards through the positions and back again: the same function, but not for who counts positions.
    monkeypatch.setattr(up_proj, "forward", lambda x: forward(x.flip(-2)).flip(-2))
    assert not routing_is_exact(backward, TASKS)


def test_a_single_task_and_the_base_model_are_no_trouble():
    model = family("llama")
    layout = LoraLayout(model, 1, lora_r=2)
    backward = Backward(model, layout, Distributed(Accelerator(cpu=True)), max_tokens=100, packing=True, seed=0)
    assert routing_is_exact(backward, 1)
    assert not hasattr(FullLayout(family("llama"), 1), "route")


def test_adapters_on_other_layers_than_linear_ones_do_not_route():
    model = family("llama")
    layout = LoraLayout(model, 2, lora_r=2, target_modules=["embed_tokens", "up_proj"])
    assert not layout.can_route
    backward = Backward(model, layout, Distributed(Accelerator(cpu=True)), max_tokens=100, packing=True, seed=0)
    assert not backward.routes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_added_as_peft_adds_them(dtype):
    """A fact of peft 0.21: what it does for another adapter is this, and no more."""
    configs = [
        LoraConfig(r=rank, lora_alpha=5, lora_dropout=0.1, target_modules=["q_proj", "up_proj"]) for rank in (3, 2, 4)
    ]
    found = []
    for own in (True, False):
        model = family("llama", dtype)
        torch.manual_seed(3)
        first, second, third = (copy.deepcopy(config) for config in configs)
        peft_model = PeftModel(model, first, adapter_name="a")
        for adapter, config in (("b", second), ("c", third)):
            if own:
                add_to_layers(peft_model, tuner_layers(model), adapter, config)
            else:
                peft_model.add_adapter(adapter, config)
        found.append((peft_model, dict(model.named_parameters())))
    (own_model, own), (peft_model, expected) = found
    assert list(own) == list(expected)
    for name, parameter in own.items():
        assert parameter.dtype == expected[name].dtype, name
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == expected[name].requires_grad, name
    assert {k: c.to_dict() for k, c in own_model.peft_config.items()} == {
        k: c.to_dict() for k, c in peft_model.peft_config.items()
    }
    for layer, other in zip(tuner_layers(own_model), tuner_layers(peft_model), strict=True):
        assert layer.scaling == other.scaling
        assert [m.training for m in layer.modules()] == [m.training for m in other.modules()]
