from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.samplers import DoReMi

SIZES = [10, 20, 30]


def trained(losses: dict[int, float]) -> TaskFeedback:
    return TaskFeedback(0, list(losses), [1] * len(losses), torch.tensor(list(losses.values()), dtype=torch.float64))


def evaluated(losses: dict[int, float]) -> TaskFeedback:
    return TaskFeedback(0, [], [], torch.empty(0), validation={task: {"loss": loss} for task, loss in losses.items()})


@pytest.mark.parametrize("average", [True, False])
def test_golden_step(average: bool) -> None:
    sampler = DoReMi(SIZES, references=[1.0, 1.0, 1.0], floor=1e-4, average=average)
    sampler.update(trained({0: 0.4, 1: 1.5, 2: 2.0}))  # excess 0, .5, 1
    np.testing.assert_allclose(sampler.probabilities, [0.186338, 0.307198, 0.506463], atol=6e-7)
    assert sampler.signals == {"excess_loss": [0.0, 0.5, 1.0]}


def test_steps_multiply_and_the_mean_is_of_all_alpha() -> None:
    eta, c, excess = 0.5, 0.01, np.array([0.0, 0.5, 1.0])
    alpha, alphas = np.full(3, 1 / 3), []
    newest, mean = (
        DoReMi(SIZES, references=[1.0, 1.0, 1.0], eta=eta, floor=c, average=average) for average in (False, True)
    )
    for _ in range(20):
        alpha = alpha * np.exp(eta * excess)
        alpha = (1 - c) * alpha / alpha.sum() + c / 3
        alphas.append(alpha)
        for sampler in (newest, mean):
            sampler.update(trained({0: 1.0, 1: 1.5, 2: 2.0}))
        np.testing.assert_allclose(newest.probabilities, alpha, rtol=1e-12)
        np.testing.assert_allclose(mean.probabilities, np.mean(alphas, axis=0), rtol=1e-12)


def test_an_absent_task_keeps_its_last_excess() -> None:
    sampler, other = (DoReMi(SIZES, references=[1.0] * 3) for _ in range(2))
    sampler.update(trained({0: 1.0, 1: 1.5, 2: 2.0}))
    other.update(trained({0: 1.0, 1: 1.5, 2: 2.0}))
    sampler.update(trained({0: 1.2}))
    other.update(trained({0: 1.2, 1: 1.5, 2: 2.0}))
    assert sampler.probabilities == other.probabilities
    assert sampler.signals == {"excess_loss": [pytest.approx(0.2), 0.5, 1.0]}


def test_a_task_not_trained_on_has_the_excess_before_training_or_the_mean() -> None:
    known = DoReMi(SIZES, references=[1.0] * 3, average=False)
    known.update(evaluated({0: 9.0, 1: 1.7, 2: 1.0}))
    assert known.probabilities == pytest.approx([1 / 3] * 3)  # an evaluation is no step
    known.update(trained({0: 1.0}))
    np.testing.assert_allclose(known.probabilities[1] / known.probabilities[2], np.exp(0.7), rtol=1e-2)
    known.update(evaluated({1: 1.0, 2: 1.0}))
    assert known.signals["excess_loss"][1] == pytest.approx(0.7)  # only the first evaluation counts

    unknown = DoReMi(SIZES, references=[1.0] * 3, average=False)
    unknown.update(trained({0: 1.0, 1: 3.0}))
    assert unknown.signals == {"excess_loss": [0.0, 2.0, None]}
    np.testing.assert_allclose(unknown.probabilities[2] / unknown.probabilities[0], np.exp(1.0), rtol=1e-2)


def test_references_by_name() -> None:
    by_name = DoReMi(SIZES, references={"c": 1.0, "情感": 3.0, "a": 2.0}, names=["a", "情感", "c"])
    in_order = DoReMi(SIZES, references=[2.0, 3.0, 1.0])
    for sampler in (by_name, in_order):
        sampler.update(trained({0: 3.0, 1: 3.0, 2: 3.0}))
    assert by_name.probabilities == in_order.probabilities
    assert by_name.probabilities[2] > by_name.probabilities[0] > by_name.probabilities[1]


def test_the_floor_holds_after_many_steps() -> None:
    sampler = DoReMi(SIZES, references=[0.0, 5.0, 5.0], floor=0.03, average=False)
    for _ in range(500):
        sampler.update(trained({0: 5.0, 1: 5.0, 2: 5.0}))
    assert sampler.probabilities == pytest.approx([0.98, 0.01, 0.01], abs=2e-4)
    assert min(sampler.probabilities) >= 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"references": {}}, r"^references: must name every task, found nothing for 'a'; add it$"),
        ({"references": {"a": 1, "b": 1}}, r"^references: must name every task, found nothing for 'c'; add it$"),
        ({"references": [1.0]}, r"^references: must be one for each of 3 tasks, found 1; or give them by name$"),
        ({"references": [1.0, -1.0, 1.0]}, r"^references: must be losses, finite and at least 0, found -1.0; "),
        ({"eta": -1.0}, r"^eta: must be above 0 and finite, found -1.0; "),
        ({"floor": 0.0}, r"^floor: must be above 0 and at most 1, found 0.0; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DoReMi(**({"sizes": SIZES, "names": ["a", "b", "c"], "references": [1.0] * 3} | arguments))
