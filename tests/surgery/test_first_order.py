"""On a language model: one small step along d lowers each task's loss by the step size times ``<g_i, d>``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

NUM_TASKS = 4


def task_losses(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    # Tasks of parts of the vocabulary, so that some of them have gradients in common.
    batches = [torch.randint(40 * task, 40 * task + 60, (3, 12), generator=generator) for task in range(NUM_TASKS)]
    return torch.stack([model(input_ids=batch, labels=batch).loss for batch in batches])


@pytest.fixture
def problem(make_model) -> tuple[nn.Module, Tensor, Tensor]:
    """A model in float64, its losses and their gradients [M, N]."""
    model = make_model()
    parameters = list(model.parameters())
    losses = task_losses(model)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return model, losses.detach(), torch.stack([nn.utils.parameters_to_vector(row) for row in rows])


def test_the_change_of_each_loss_is_that_of_first_order(make_surgery, problem) -> None:
    model, losses, rows = problem
    d = make_surgery()(rows)
    assert d.norm() > 0
    step_size = 1e-5 / float(d.norm())
    parameters = list(model.parameters())
    before = nn.utils.parameters_to_vector(parameters).detach().clone()
    with torch.no_grad():
        nn.utils.vector_to_parameters(before - step_size * d, parameters)
        changes = task_losses(model) - losses
        nn.utils.vector_to_parameters(before, parameters)
    bound = 0.02 * step_size * rows.norm(dim=1) * d.norm()
    assert ((changes + step_size * (rows @ d)).abs() <= bound).all()
    assert (changes.abs() > bound).any()  # or the test could not fail
