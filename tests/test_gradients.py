"""Losses and rows do not depend on how the work is cut, and equal transformers' own loss."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers.loss.loss_utils import fixed_cross_entropy

from mtl.data.batching import Batch, fill_rows, row_length, stack
from mtl.data.tokenized import TokenizedExample
from mtl.distributed import Distributed
from mtl.gradients import Anchor, Backward, attach
from mtl.models import FullLayout, LoraLayout

TASKS = 3


def random_examples(generator, counts, longest=40):
    """Examples of unequal length with answers of unequal length, task by task."""
    examples = []
    for task, count in enumerate(counts):
        for _ in range(count):
            length = int(generator.integers(3, longest))
            num_targets = int(generator.integers(1, length))
            ids = generator.integers(0, 258, length).astype(np.int32)
            examples.append((task, TokenizedExample(ids, np.arange(length) >= length - num_targets)))
    return examples


def make_backward(model, layout, *, max_tokens=10_000, packing=False, seed=0):
    return Backward(
        model, layout, Distributed(Accelerator(cpu=True)), max_tokens=max_tokens, packing=packing, seed=seed
    )


def lora(model, private=2, dropout=0.0):
    layout = LoraLayout(model, TASKS, lora_r=3, private_lora_r=private, lora_dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layout.parameters():  # B starts at 0, which would make every gradient of A 0
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return layout


def reference_losses(model, layout, examples):
    """Each present task's mean NLL, example by example with transformers' own loss.

    Its core, that is: ``model(labels=...)`` rounds float64 logits to float32 before.
    """
    losses = {}
    for task in sorted({task for task, _ in examples}):
        total, num_targets = 0.0, 0
        for _, example in (pair for pair in examples if pair[0] == task):
            ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
            labels = torch.where(torch.from_numpy(example.is_target)[None], ids, -100)[0, 1:]
            with layout.activate(task):
                logits = model(input_ids=ids).logits[0, :-1]
            total = total + fixed_cross_entropy(logits, labels, num_items_in_batch=1)
            num_targets += int((labels != -100).sum())
        losses[task] = total / num_targets
    return losses


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["shared", "shared_and_per_task", "full"])
@pytest.mark.parametrize("packing", [False, True])
def test_mixed_pass_is_the_gradient_of_the_objective_of_transformers_loss(make_model, kind, packing):
    model = make_model()
    layout = FullLayout(model, TASKS) if kind == "full" else lora(model, private=0 if kind == "shared" else 2)
    examples = random_examples(np.random.default_rng(0), [5, 1, 3])
    scale = torch.tensor([5 / 9, 1 / 9, 3 / 9], dtype=torch.float64)

    result = make_backward(model, layout, max_tokens=64, packing=packing)(
        Batch(examples, TASKS), scale, step=0, apart=False
    )
    losses = reference_losses(model, layout, examples)
    objective = sum(scale[task] * loss for task, loss in losses.items())
    objective.backward()

    expected = torch.cat([p.grad.flatten() for p in layout.shared_parameters()])
    assert relative(result.shared_RN[0], expected) < 1e-9
    assert torch.allclose(result.losses_M, torch.stack(list(losses.values())).detach(), rtol=1e-9, atol=0)
    for task, private in enumerate(result.private):
        parameters = layout.private_parameters(task)
        if parameters:
            assert relative(private, torch.cat([p.grad.flatten() for p in parameters])) < 1e-9


@pytest.mark.parametrize("packing", [False, True])
def test_rows_are_the_gradients_of_each_tasks_loss(make_model, packing):
    model = make_model()
    layout = lora(model)
    examples = random_examples(np.random.default_rng(1), [4, 0, 2])
    result = make_backward(model, layout, max_tokens=50, packing=packing)(
        Batch(examples, TASKS), torch.ones(TASKS, dtype=torch.float64), step=0, apart=True
    )
    losses = reference_losses(model, layout, examples)
    assert result.tasks == [0, 2]
    assert result.shared_RN.shape == (2, sum(p.numel() for p in layout.shared_parameters()))
    for row, task in enumerate(result.tasks):
        expected = torch.autograd.grad(losses[task], layout.shared_parameters(), retain_graph=True)
        assert relative(result.shared_RN[row], torch.cat([g.flatten() for g in expected])) < 1e-9


def test_cutting_the_step_anyhow_gives_the_same_numbers(make_model):
    model = make_model()
    layout = lora(model)
    generator = np.random.default_rng(2)
    for case in range(15):
        counts = generator.integers(0, 6, TASKS)
        counts[int(generator.integers(TASKS))] += 1
        batch = Batch(random_examples(generator, counts), TASKS)
        ones = torch.ones(TASKS, dtype=torch.float64)
        whole = make_backward(model, layout)(batch, ones, step=0, apart=True)
        for max_tokens, packing in ((1, False), (45, False), (45, True), (10_000, True)):
            cut = make_backward(model, layout, max_tokens=max_tokens, packing=packing)(batch, ones, step=0, apart=True)
            assert relative(cut.shared_RN, whole.shared_RN) < 1e-9, (case, max_tokens, packing)
            assert torch.allclose(cut.losses_M, whole.losses_M, rtol=1e-9, atol=0)
            mixed = make_backward(model, layout, max_tokens=max_tokens, packing=packing)(
                batch, ones, step=0, apart=False
            )
            assert relative(mixed.shared_RN[0], whole.shared_RN.sum(0)) < 1e-9


def test_float32_rows_are_within_1e_5_of_each_other(make_model):
    model = make_model(torch.float32)
    layout = lora(model)
    batch = Batch(random_examples(np.random.default_rng(3), [4, 2, 5]), TASKS)
    ones = torch.ones(TASKS)
    whole = make_backward(model, layout)(batch, ones, step=0, apart=True)
    cut = make_backward(model, layout, max_tokens=40, packing=True)(batch, ones, step=0, apart=True)
    for row in range(TASKS):
        assert relative(cut.shared_RN[row], whole.shared_RN[row]) < 1e-5


def test_a_single_task_of_the_step_keeps_its_weight(make_model):
    """Dividing by the weights that happen to be present would lose them."""
    model = make_model()
    layout = lora(model)
    batch = Batch(random_examples(np.random.default_rng(4), [0, 3, 0]), TASKS)
    once = make_backward(model, layout)(batch, torch.tensor([0, 1.0, 0]), step=0, apart=False)
    twice = make_backward(model, layout)(batch, torch.tensor([0, 2.0, 0]), step=0, apart=False)
    assert torch.equal(twice.shared_RN, 2 * once.shared_RN)
    assert torch.equal(twice.private[0], 2 * once.private[0])


def test_dropout_masks_belong_to_the_step(make_model):
    model = make_model().train()
    layout = lora(model, dropout=0.5)
    batch = Batch(random_examples(np.random.default_rng(5), [2, 2, 2]), TASKS)
    ones = torch.ones(TASKS)

    def rows(step, seed=0):
        return make_backward(model, layout, seed=seed)(batch, ones, step=step, apart=True).shared_RN.clone()

    assert torch.equal(rows(3), rows(3))
    assert not torch.equal(rows(3), rows(4))
    assert not torch.equal(rows(3), rows(3, seed=1))


def test_ranks_share_the_examples_out():
    batch = Batch(random_examples(np.random.default_rng(6), [5, 2, 4]), TASKS)
    for world_size in (1, 2, 3, 20):
        slices = [batch.slice(rank, world_size).examples for rank in range(world_size)]
        assert sorted(id(e) for part in slices for _, e in part) == sorted(id(e) for _, e in batch.examples)
        tokens = [sum(len(e.input_ids) for _, e in part) for part in slices]
        assert max(tokens) - min(tokens) <= 40  # never more than one example apart


@pytest.mark.parametrize("row_tokens", [0, 45, 1000])
@pytest.mark.parametrize("mix_tasks", [False, True])
def test_micro_batches_keep_to_the_budget_and_lose_nothing(row_tokens, mix_tasks):
    batch = Batch(random_examples(np.random.default_rng(7), [7, 1, 12]), TASKS)
    cut = list(batch.micro_batches(90, row_tokens=row_tokens, mix_tasks=mix_tasks))
    assert all(part.input_ids_BS.numel() <= 90 for part in cut)
    assert all(len(part.tasks) == 1 for part in cut) or mix_tasks
    labels = np.concatenate([part.label_tasks.numpy() for part in cut])
    assert np.array_equal(np.bincount(labels, minlength=TASKS), batch.num_targets_T)
    assert sum(int(part.keep_BS.sum()) for part in cut) == len(labels)


def test_attach_lets_backward_write_into_the_buffer():
    parameters = [torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(4))]
    flat = torch.zeros(10)
    attach(parameters, flat)
    (parameters[0].sum() * 2 + parameters[1].sum() * 3).backward()
    assert flat.tolist() == [2.0] * 6 + [3.0] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_loss_scale_that_is_a_power_of_two_changes_no_bit(make_model, dtype):
    examples = random_examples(np.random.default_rng(5), [4, 2, 3])
    found = []
    for loss_scale in (1.0, 2.0**12):
        model = make_model(dtype)
        backward = make_backward(model, lora(model), max_tokens=60)
        backward.loss_scale = loss_scale
        found.append(backward(Batch(examples, TASKS), torch.ones(TASKS), step=0, apart=True))
    plain, scaled = found
    assert torch.equal(scaled.shared_RN, plain.shared_RN)
    assert torch.equal(scaled.losses_M, plain.losses_M)
    assert all(map(torch.equal, scaled.private, plain.private))


@pytest.mark.parametrize("capacity", [30, 60, 200, 10_000])
def test_rows_are_few_and_keep_tasks_together(capacity):
    for seed in range(20):
        examples = random_examples(np.random.default_rng(seed), [9, 4, 12])
        rows = fill_rows(examples, capacity)
        assert sorted(id(example) for row in rows for _, example in row) == sorted(id(e) for _, e in examples)
        lengths = [row_length(row) for row in rows]
        longest = max(len(example.input_ids) for _, example in examples)
        assert all(length <= capacity or len(row) == 1 for length, row in zip(lengths, rows, strict=True))
        assert len(rows) <= 1.25 * -(-sum(lengths) // capacity) + 1 + (longest > capacity) * len(examples)
        pieces = sum(len({task for task, _ in row}) for row in rows)
        if longest <= capacity / 4 and sum(lengths) < 0.9 * len(rows) * capacity:
            assert pieces <= TASKS + len(rows) - 1, "tasks are cut into more pieces than there are rows to fill"


def test_segments_cover_every_position_of_their_tasks():
    examples = random_examples(np.random.default_rng(3), [3, 2, 2])
    rows = [examples[:3], examples[3:4], examples[4:]]
    micro_batch = stack(rows)
    ends = [segment.stop for segment in micro_batch.segments]
    assert [segment.start for segment in micro_batch.segments] == [0, *ends[:-1]]
    assert ends[-1] == micro_batch.input_ids_BS.numel()
    task_of_position = np.concatenate([np.full(s.stop - s.start, s.task) for s in micro_batch.segments])
    assert np.array_equal(task_of_position[micro_batch.keep_BS.flatten().numpy()], micro_batch.label_tasks.numpy())
    assert micro_batch.boundaries is None
    packed = stack([examples])
    assert packed.boundaries.diff().tolist() == [
        len(example.input_ids) for _, example in sorted(examples, key=lambda pair: pair[0])
    ]


@pytest.mark.parametrize("private", [0, 2])
def test_the_pull_of_an_earlier_model_is_its_kl_at_the_target_tokens(make_model, private):
    """Rows against plain autograd of loss plus KL; the losses that are told do not have it."""
    model = make_model()
    layout = lora(model, private=private)
    generator = torch.Generator().manual_seed(5)
    earlier = [0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in layout.parameters()]
    backward = make_backward(model, layout, max_tokens=60, packing=True)
    examples = random_examples(np.random.default_rng(3), [2, 3, 1])
    batch, ones_T = Batch(examples, TASKS), torch.ones(TASKS, dtype=torch.float64)
    plain = backward(batch, ones_T, step=0, apart=True)
    plain_TN = plain.shared_RN.clone()
    backward.anchor = Anchor(0.7, list(zip(layout.parameters(), earlier, strict=True)))
    before = [parameter.detach().clone() for parameter in layout.parameters()]
    found = backward(batch, ones_T, step=0, apart=True)
    assert torch.equal(found.losses_M, plain.losses_M)
    assert all(torch.equal(a, b) for a, b in zip(layout.parameters(), before, strict=True))

    def put(values):
        with torch.no_grad():
            for parameter, value in zip(layout.parameters(), values, strict=True):
                parameter.copy_(value)

    for task in range(TASKS):
        total_N, num_targets = torch.zeros(found.shared_RN.shape[1], dtype=torch.float64), 0
        with layout.activate(task):
            for example in (item for owner, item in examples if owner == task):
                ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
                kept = torch.from_numpy(example.is_target[1:])
                put(earlier)
                with torch.no_grad():
                    teacher = model(input_ids=ids).logits[0, :-1][kept].softmax(-1)
                put(before)
                now = model(input_ids=ids).logits[0, :-1][kept].log_softmax(-1)
                targets = ids[0, 1:][kept]
                divergence = (teacher * (teacher.log() - now)).sum()
                loss = 0.7 * divergence - now[torch.arange(len(targets)), targets].sum()
                gradients = torch.autograd.grad(loss, layout.shared_parameters())
                total_N += torch.cat([gradient.flatten() for gradient in gradients])
                num_targets += len(targets)
        expected = total_N / num_targets
        assert relative(found.shared_RN[task], expected) < 1e-9
        assert relative(plain_TN[task], expected) > 1e-3
