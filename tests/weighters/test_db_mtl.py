from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl.interfaces import TaskFeedback
from mtl.weighters import DBMTL
from mtl.weighters.db_mtl import max_norm_scales


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def feedback(rows: dict[int, Tensor], losses: dict[int, float]) -> TaskFeedback:
    grads_MN = torch.stack(list(rows.values()))
    return TaskFeedback(0, list(rows), [1] * len(rows), double(*losses.values()), gramian_MM=grads_MN @ grads_MN.T)


def of_norms(norms: dict[int, float], losses: dict[int, float]) -> TaskFeedback:
    return feedback({task: norm * double(0.6, 0.8) for task, norm in norms.items()}, losses)


def random_step(*scales: float) -> tuple[dict[int, Tensor], dict[int, float]]:
    rows = {task: scale * torch.randn(9, dtype=torch.float64) for task, scale in enumerate(scales)}
    return rows, dict(enumerate((0.1 + 3 * torch.rand(len(scales))).tolist()))


def test_scales_bring_all_norms_to_the_largest() -> None:
    norms = double(0.5, 4.0, 1.0)
    assert (norms * max_norm_scales(norms)).tolist() == [4.0, 4.0, 4.0]
    assert max_norm_scales(norms, max_scale=3.0).tolist() == [3.0, 1.0, 3.0]


def test_without_averaging_the_present_tasks_weighted_gradients_have_equal_norms() -> None:
    weighter = DBMTL(4, beta=0.0)
    for scales in [(1, 0.1, 3, 7), (5, 2, 0.3, 1)]:
        rows, losses = random_step(*scales)
        weights = weighter.weights(feedback(rows, losses))
        norms = [float((weights[task] * row).norm()) for task, row in rows.items()]
        assert norms == pytest.approx([norms[0]] * 4, rel=1e-13)
        weighter.update(feedback(rows, losses))
    rows, losses = random_step(1, 20, 3, 4)
    del rows[1], losses[1]
    weights = weighter.weights(feedback(rows, losses))
    norms = [float((weights[task] * row).norm()) for task, row in rows.items()]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-13)


def test_contributions_are_the_papers_in_direction_and_proportion() -> None:
    """At beta = 0 the sum of the weighted gradients is along the paper's sum of scaled log-loss gradients."""
    rows, losses = random_step(1, 0.2, 3)
    log_rows = torch.stack([rows[task] / losses[task] for task in rows])
    norms = log_rows.norm(dim=1)
    paper = (log_rows * (norms.max() / norms)[:, None]).sum(0)
    found = torch.stack(list(rows.values())).T @ DBMTL(3, beta=0.0).weights(feedback(rows, losses))
    torch.testing.assert_close(found / found.norm(), paper / paper.norm(), rtol=1e-12, atol=1e-14)


def test_weights_go_by_the_mean_of_the_log_losses_norms_with_this_step() -> None:
    weighter = DBMTL(2, beta=0.5, min_loss=0.01)
    steps = [
        ({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.0}),
        ({0: 3.0, 1: 1.0}, {0: 1.0, 1: 0.25}),
        ({0: 2.0, 1: 6.0}, {0: 2.0, 1: 2.0}),
    ]
    for norms, losses in steps[:2]:
        weighter.update(of_norms(norms, losses))
    means = [(0.25 * 2 + 0.5 * 3 + 1) / 1.75, (0.25 * 2 + 0.5 * 4 + 3) / 1.75]
    raw = double(max(means) / means[0] / 2.0, max(means) / means[1] / 2.0)
    torch.testing.assert_close(weighter.weights(of_norms(*steps[2])), raw * 2 / raw.sum(), rtol=1e-13, atol=0)


def test_with_averaging_norms_are_equal_once_steps_are_alike() -> None:
    weighter = DBMTL(3)
    for factor in (3.0, 1.0, *[2.0] * 300):
        step = of_norms({0: factor, 1: 2.0, 2: 0.5}, {0: 1.0, 1: 0.3, 2: 2.0})
        weighter.update(step)
    assert (weighter.weights(None) * double(2.0, 2.0, 0.5)).tolist() == pytest.approx([1.0] * 3, rel=1e-9)


def test_scale_of_a_loss_cancels() -> None:
    """Ten times a loss has ten times the gradient; its weighted gradient stays the same part of the whole."""
    rows, losses = random_step(1, 0.2, 3)
    small = DBMTL(3).weights(feedback(rows, losses))
    large = DBMTL(3).weights(feedback({**rows, 1: 10 * rows[1]}, {**losses, 1: 10 * losses[1]}))
    assert float(large[1] * 10 / large[0]) == pytest.approx(float(small[1] / small[0]), rel=1e-12)


def test_a_memorised_task_fades_out() -> None:
    """Gradient and loss go to 0 together: at first its part stays level, then it falls."""
    parts = []
    for loss in (1.0, 1e-1, 1e-2, 1e-4, 1e-6, 0.0):
        weights = DBMTL(2, beta=0.0).weights(of_norms({0: 1.0, 1: loss}, {0: 1.0, 1: loss}))
        assert weights.isfinite().all()
        assert weights[1] / weights[0] < 2_000.01
        parts.append(float(weights[1] * loss / weights[0]))
    assert parts[:3] == pytest.approx([1, 1, 1])
    assert 1 > parts[3] > 100 * parts[4] - 1e-12 > parts[5] == 0


def test_max_scale_1_leaves_log_losses() -> None:
    weights = DBMTL(2, max_scale=1.0).weights(of_norms({0: 5.0, 1: 0.3}, {0: 0.5, 1: 2.0}))
    torch.testing.assert_close(weights, double(1.6, 0.4), rtol=1e-14, atol=0)


def test_without_any_gradient_weights_stay() -> None:
    weights = DBMTL(3).weights(of_norms({0: 0.0, 2: 0.0}, {0: 0.5, 2: 2.0}))
    assert weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.0}, r"^beta: must be in \[0, 1\), found 1.0; "),
        ({"beta": math.nan}, r"^beta: must be in \[0, 1\), found nan; "),
        ({"min_loss": 0.0}, r"^min_loss: must be above 0 nats per token, found 0.0; "),
        ({"max_scale": 0.5}, r"^max_scale: must be at least 1, found 0.5; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DBMTL(2, **arguments)
