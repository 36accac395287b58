"""The measured conflict is the cosine of the tasks' own gradients on two halves of a step, and changes no number."""

import json
from math import isnan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from mtl.cli import main
from mtl.conflict import MAX_TASKS, cosines_between_halves, measure_conflict, split_in_halves
from mtl.data.batching import Batch
from mtl.data.tokenized import TokenizedExample
from mtl.distributed import Distributed
from mtl.gradients import Backward
from mtl.models import LoraLayout


def random_examples(generator, counts):
    """Examples of unequal length, of which the last tokens are targets, task by task."""
    examples = []
    for task, count in enumerate(counts):
        for length in generator.integers(5, 30, count).tolist():
            ids = generator.integers(0, 258, length).astype(np.int32)
            examples.append((task, TokenizedExample(ids, np.arange(length) >= length // 2)))
    return examples


def make_backward(model, private=0):
    """On three tasks, with adapters that act."""
    layout = LoraLayout(model, 3, lora_r=3, private_lora_r=private, lora_dropout=0.0)
    with torch.no_grad():
        for parameter in layout.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return Backward(model, layout, Distributed(Accelerator(cpu=True)), max_tokens=60, packing=True, seed=0)


def task_loss(backward, task, examples):
    """The mean over the target tokens, example by example."""
    nll, num_targets = 0.0, 0
    for _, example in (pair for pair in examples if pair[0] == task):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        targets = torch.from_numpy(example.is_target)[1:]
        with backward.layout.activate(task):
            logits = backward.model(input_ids=ids[None]).logits[0, :-1]
        nll = nll + F.cross_entropy(logits[targets], ids[1:][targets], reduction="sum")
        num_targets += int(targets.sum())
    return nll / num_targets


def run_with(backward, *, every=1, step=0):
    options = SimpleNamespace(conflict_steps=every)
    return SimpleNamespace(options=options, backward=backward, state=SimpleNamespace(step=step))


def test_halves_share_no_example_and_have_equal_counts():
    examples = random_examples(np.random.default_rng(0), [5, 1, 2])
    halves = split_in_halves(Batch(examples, 3))
    assert [half.counts_T.tolist() for half in halves] == [[2, 0, 1], [2, 0, 1]]
    chosen = [id(example) for half in halves for _, example in half.examples]
    assert len(set(chosen)) == len(chosen) == 6
    assert split_in_halves(Batch(random_examples(np.random.default_rng(0), [1, 1]), 2)) is None


def test_of_many_tasks_those_with_the_most_examples_are_measured():
    counts = [2] * MAX_TASKS + [1, 4, 3]
    first, _ = split_in_halves(Batch(random_examples(np.random.default_rng(0), counts), len(counts)))
    assert np.flatnonzero(first.counts_T).tolist() == [*range(MAX_TASKS - 2), MAX_TASKS + 1, MAX_TASKS + 2]


@pytest.mark.parametrize("private", [0, 2])
def test_cosines_are_those_of_plain_autograd(make_model, private):
    backward = make_backward(make_model(), private)
    batch = Batch(random_examples(np.random.default_rng(1), [4, 1, 2]), 3)
    conflict = measure_conflict(run_with(backward), batch)

    rows = {}
    for place, half in enumerate(split_in_halves(batch)):
        for task in (0, 2):
            loss = task_loss(backward, task, half.examples)
            gradients = torch.autograd.grad(loss, backward.layout.shared_parameters())
            rows[task, place] = torch.cat([gradient.flatten() for gradient in gradients])

    def cosine(a, b):
        return float(rows[a] @ rows[b] / rows[a].norm() / rows[b].norm())

    assert list(conflict.tasks) == [0, 2]
    expected = [[(cosine((s, 0), (t, 1)) + cosine((s, 1), (t, 0))) / 2 for t in (0, 2)] for s in (0, 2)]
    torch.testing.assert_close(conflict.cosines_KK, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_zero_gradient_has_no_cosine():
    cosines = cosines_between_halves(torch.tensor([[0.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
    assert isnan(cosines[0, 0])


def test_it_is_measured_when_due(make_model):
    backward = make_backward(make_model())
    batch = Batch(random_examples(np.random.default_rng(1), [2, 2, 2]), 3)
    assert measure_conflict(run_with(backward, every=None), batch) is None
    due = [step for step in range(6) if measure_conflict(run_with(backward, every=3, step=step), batch)]
    assert due == [2, 5]


def test_the_run_is_the_same_with_and_without(tmp_path, monkeypatch, tiny_folder, make_task, capsys):
    """Byte for byte, dropout and all, but for what is measured."""
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    paths = {
        name: make_task(name, [{"prompt": f"{name} {i}", "completion": "ab"[i % 2]} for i in range(30)])
        for name in ("one", "two")
    }
    given = [
        *(f"model.name_or_path={tiny_folder}", "tasks=none", *(f"tasks.{name}.path={paths[name]}" for name in paths)),
        *("max_steps=4", "batch_size=6", "max_eval_examples=2", "max_test_examples=2", "eval_scores=false"),
        *("evals_per_stage=1", "adapters.lora_dropout=0.3", "surgery=pcgrad"),
    ]
    assert main(["train", *given, "output_dir=plain"]) == 0, capsys.readouterr().err
    assert main(["train", *given, "output_dir=measured", "conflict_steps=2"]) == 0, capsys.readouterr().err
    plain, measured = (
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        for folder in ("plain", "measured")
    )
    found = {record["step"]: record.pop("conflict") for record in measured if "conflict" in record}
    assert plain == measured
    assert list(found) == [2, 4]
    assert found[2]["tasks"] == ["one", "two"]
    assert np.shape(found[2]["cosines"]) == (2, 2)
