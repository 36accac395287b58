from __future__ import annotations

import numpy as np
import pytest
import torch

from mtl.data.tokenized import TokenizedExample
from mtl.evaluation.batches import evaluating
from mtl.evaluation.losses import summed_losses


def ignore(num_examples):
    pass


def reference_loss(model, example):
    """Summed NLL of the targets from a plain forward of one example, all logits."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))
    log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return -sum(log_probs[i - 1, ids[i]].item() for i in range(1, len(ids)) if example.is_target[i])


@pytest.fixture
def examples(make_data, rows):
    return [example.tokens for example in make_data(rows).val]


@pytest.mark.parametrize("token_budget", [1, 90, 10_000])
def test_equals_one_plain_forward_per_example_however_cut(any_model, examples, token_budget):
    with evaluating(any_model):
        losses = summed_losses(any_model, examples, token_budget=token_budget, on_batch=ignore)
        expected = [reference_loss(any_model, example) for example in examples]
    assert losses == pytest.approx(expected, rel=1e-11)


def test_equals_the_loss_of_transformers(model, examples):
    losses = summed_losses(model, examples, token_budget=200, on_batch=ignore)
    for example, loss in zip(examples, losses, strict=True):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(example.is_target), ids, -100)
        mean = model(input_ids=ids[None], labels=labels[None]).loss.item()  # in float32, whatever the model
        assert loss == pytest.approx(mean * example.is_target.sum(), rel=1e-5)


def test_several_turns_and_a_target_without_context(model):
    is_target = np.array([True, False, True, True, False, False, True])
    example = TokenizedExample(np.array([7, 8, 9, 10, 11, 12, 13], dtype=np.int32), is_target)
    [loss] = summed_losses(model, [example], token_budget=100, on_batch=ignore)
    assert loss == pytest.approx(reference_loss(model, example), rel=1e-12)


def test_half_precision_logits_are_upcast_before_the_softmax(build_model, examples):
    model = build_model("llama", torch.bfloat16)
    example = examples[0]
    [loss] = summed_losses(model, [example], token_budget=1000, on_batch=ignore)
    ids = torch.from_numpy(example.input_ids.astype(np.int64))
    log_probs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    expected = -sum(log_probs[i - 1, ids[i]].double() for i in range(len(ids)) if example.is_target[i])
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_progress_counts_every_example_once(model, examples):
    done = []
    summed_losses(model, examples, token_budget=90, on_batch=done.append)
    assert sum(done) == len(examples)
    assert len(done) > 1


def test_evaluating_restores_each_modules_own_mode(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
