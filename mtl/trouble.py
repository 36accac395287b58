"""Trouble during training: losses and gradients that are not finite, and memory that runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtl.errors import RankError, UserError
from mtl.evaluation.batches import evaluating
from mtl.evaluation.losses import summed_losses
from mtl.options import Options
from mtl.run import Run, StageParts
from mtl.step import StepOutcome, batch_of

MAX_TASKS = 5  # named in a message
MAX_EXAMPLES = 3  # of each of them


def handle_non_finite(run: Run, parts: StageParts, outcome: StepOutcome) -> None:
    """Follows ``non_finite`` for a step that updated nothing: goes on, within the limit, or ends the run.

    Raises:
        UserError: Names the step, the tasks and their examples.
    """
    if bool(outcome.losses_M.isfinite().all()) and run.loss_scale.overflowed():
        return  # float16's own trouble, which the lower scale cures
    run.state.num_skipped_steps += 1
    description = describe(run, parts, outcome)  # on every rank: it takes all of them to find out
    if run.options.non_finite == "skip" and run.state.num_skipped_steps <= run.options.max_skipped_steps:
        if run.log:
            run.log.warn(f"{description} The step is skipped.")
        return
    limit = f" That is step {run.state.num_skipped_steps} of this kind, over max_skipped_steps."
    raise UserError(
        f"{description}{limit if run.options.non_finite == 'skip' else ''} Lower learning_rate, look "
        "for damaged examples, or set non_finite=skip; the last checkpoint is kept."
    )


def describe(run: Run, parts: StageParts, outcome: StepOutcome) -> str:
    """What is not finite: the tasks, and their examples in the step."""
    found = []
    losses = dict(zip(outcome.tasks, outcome.losses_M.tolist(), strict=True))
    rows_of = {task: [row for t, row in outcome.rows if t == parts.tasks[task]] for task in outcome.tasks}
    bad = [task for task, loss in losses.items() if not math.isfinite(loss)]
    guilty_of = {task: bad_rows(run, parts.tasks[task], rows_of[task]) for task in bad}
    # A NaN of one task can reach the loss of another, whose example is packed with it behind a mask.
    tasks = [task for task in bad if guilty_of[task]] or bad or tasks_of_bad_gradients(run, parts, outcome)
    for task in tasks[:MAX_TASKS]:
        index, rows = parts.tasks[task], rows_of[task]
        guilty = guilty_of.get(task)
        named = [run.data[index].train_locations[row] for row in (guilty or rows)[:MAX_EXAMPLES]]
        more = f" and {len(guilty or rows) - len(named)} more" if len(guilty or rows) > len(named) else ""
        what = (
            f"the loss of task {run.names[index]!r} is {losses[task]}"
            if task in bad
            else (f"the gradient of task {run.names[index]!r} is not finite")
        )
        found.append(f"{what} (examples {', '.join(named)}{more})")
    if len(tasks) > MAX_TASKS:
        found.append(f"and so for {len(tasks) - MAX_TASKS:,} more")
    return f"Step {run.state.step + 1}: {'; '.join(found) or 'the gradient is not finite'}."


def bad_rows(run: Run, task: int, rows: list[int]) -> list[int]:
    """The rows whose own loss is not finite; none if it takes dropout or their company to make it so."""
    with evaluating(run.model), run.layout.activate(task):
        losses = summed_losses(
            run.model,
            [run.data[task].train[row] for row in rows],
            token_budget=run.options.micro_batch_tokens,
            on_batch=lambda num_examples: None,
        )
    return [row for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)]


def tasks_of_bad_gradients(run: Run, parts: StageParts, outcome: StepOutcome) -> list[int]:
    """The stage's tasks whose gradients are not finite by themselves, computed again with the tasks apart."""
    batch = batch_of(run, outcome.rows)
    bad = []
    for task in outcome.tasks:
        alone = batch_of(run, [pair for pair in outcome.rows if pair[0] == parts.tasks[task]])
        ones_T = torch.ones(batch.num_tasks, dtype=torch.float64)
        gradients = run.backward(alone, ones_T, step=run.state.step, apart=False)
        finite = [bool(part.isfinite().all()) for part in (gradients.shared_RN, *gradients.private)]
        if run.distributed.largest(not all(finite)):
            bad.append(task)
    return bad


@contextmanager
def explained_memory(options: Options) -> Iterator[None]:
    """Turns "out of memory" into what can be done about it.

    Raises:
        RankError: Memory ran out within the block.
    """
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in first_line:
            raise
        raise RankError(
            f"Out of memory: {first_line} Lower micro_batch_tokens={options.micro_batch_tokens} (in an evaluation "
            f"eval_micro_batch_tokens={options.eval_micro_batch_tokens}; neither changes the numbers), set "
            "model.gradient_checkpointing=true, or spread the model with launch=fsdp2."
        ) from error
