"""Merging branches of one training by weights that validation data choose.

    theta = theta_0 + sum_b w_b (theta_b - theta_0),   w >= 0, sum_b w_b <= 1,

with theta_0 the start that the branches share; where none is given the weights sum to 1. Shared parameters have one
vector of weights, the own ones of each task another (:mod:`mtl.merging.mixtures`).

A LoRA's A and B are mixed as they are, and not their product B A: so the result has the rank it had and can be trained
on. The product of mixed A and B is not the mixture of the products, but for branches of one training all of A and B
between them are near; how good a mixture is, is not assumed but validated, for each candidate.

The test split is read once the weights are chosen. The folder appears when all of it is written.

Source: Jiang et al., "ForkMerge", NeurIPS 2023.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtl.checkpoint import sync
from mtl.composition import composed, settings_of
from mtl.distributed import Distributed
from mtl.errors import UserError
from mtl.interrupt import StopSignal
from mtl.job import begin_with_base, deterministic, evaluate_base_model, finish, make_accelerator
from mtl.merging.branches import (
    Branch,
    add_costs,
    check_alike,
    check_fits,
    check_start,
    expanded,
    read_branch,
    read_branches,
)
from mtl.merging.candidates import Candidates
from mtl.merging.mixtures import Search
from mtl.prepare import Prepared, prepare
from mtl.reporting.json_files import to_json, write_atomically
from mtl.reporting.results import read_results, write_results
from mtl.run import Run
from mtl.settings import Settings
from mtl.training import save
from mtl.trouble import explained_memory

EVALUATIONS_OF_A_POINT = 12  # the greedy search takes 5, twice where tasks have parameters of their own
START = "start"  # what it is called in files and logs


@dataclass(frozen=True)
class Request:
    """What ``mtl merge`` is asked for.

    Args:
        runs: Folders of the branches, or of sweeps.
        output: Where the merged run goes.
        start: The run that they all began with.
        select: The objective; that of the first run if not given.
        reference: Folder of single-task runs, for objectives that compare with them.
        max_evaluations: How many mixtures to validate; 12 for each run to merge if not given.
    """

    runs: Sequence[Path]
    output: Path
    start: Path | None
    select: str | None
    reference: Path | None
    max_evaluations: int | None


def merge(request: Request) -> Path:
    """Merges runs and leaves the folder of a run.

    Raises:
        UserError: For whatever a user can put right.
        Stopped: It was asked to stop; nothing is left behind.
    """
    if request.output.exists():
        raise UserError(f"--output={request.output}: is there already. Choose another folder.")
    branches = read_branches(expanded(request.runs))
    if len(branches) < 2:
        raise UserError(f"RUNS: there must be at least two to merge, and there is {branches[0].folder} alone.")
    taken = any(branch.name == START for branch in branches)
    start = None if request.start is None else read_branch(request.start, str(request.start) if taken else START)
    points = [*branches, *([start] if start else [])]
    check_alike(points)
    if start:
        check_start(start, branches)
    if request.max_evaluations is not None and request.max_evaluations < len(points):
        raise UserError(
            f"--max-evaluations={request.max_evaluations}: must be at least {len(points)}, one for each run to merge."
        )
    settings = merged_settings(request, branches)
    with appearing(request.output) as folder:
        merge_into(settings, folder, request, branches, start)
    return request.output


def merged_settings(request: Request, branches: Sequence[Branch]) -> Settings:
    """Those of the first branch, with what is asked for; what they go by is validated anew for every mixture."""
    config = composed([], run_config=str(branches[0].folder / "config.yaml"))
    config.output_dir = str(request.output)
    config.merged_from = [str(branch.folder) for branch in branches]
    if request.select is not None:
        config.select_by = request.select
    if request.reference is not None:
        config.reference = str(request.reference)
    if not config.select_by.endswith("loss_ratio"):
        config.eval_scores = True
    settings = settings_of(config, request.output)
    strategy = {
        lever: "|".join(dict.fromkeys(str(branch.results.strategy.get(lever)) for branch in branches))
        for lever in branches[0].results.strategy
    }
    return replace(settings, strategy={**strategy, "merged": settings.options.select_by})


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` when all is done, and else is deleted.

    What a kill leaves of an earlier try is hidden beside it, and deleted too.
    """
    hidden = output.parent / f".{output.name}.merging"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        (hidden / output.name).mkdir(parents=True)
        yield hidden / output.name
        (hidden / output.name).rename(output)
        sync(output.parent)
    except OSError as error:
        raise UserError(
            f"--output={output}: {error.filename or hidden}: {error.strerror or error}. Nothing was written; put it "
            "right or choose another folder."
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def merge_into(
    settings: Settings, folder: Path, request: Request, branches: Sequence[Branch], start: Branch | None
) -> None:
    """Does the work in a folder of its own."""
    accelerator = make_accelerator(settings)
    stop = StopSignal()
    try:
        with deterministic(settings), stop.listening():
            hidden = replace(settings, output_dir=folder, resume_from=None)
            prepared = prepare(hidden, Distributed(accelerator), stop)
            run = prepared.run
            assert run.log is not None
            try:
                with explained_memory(run.options):
                    choose_and_finish(prepared, settings, request, branches, start)
            except BaseException:
                run.log.close(succeeded=False)
                raise
            run.log.close(succeeded=True)
    finally:
        accelerator.end_training()


def choose_and_finish(
    prepared: Prepared, settings: Settings, request: Request, branches: Sequence[Branch], start: Branch | None
) -> None:
    """Searches the weights on validation data, then writes what a run leaves."""
    run = prepared.run
    points = [*branches, *([start] if start else [])]
    for branch in points:
        check_fits(branch, run.identity)
    begin_with_base(run, evaluate_base_model(prepared, settings, "val"))
    add_costs(run, branches, start)
    max_evaluations = request.max_evaluations or EVALUATIONS_OF_A_POINT * len(points)
    candidates = Candidates(run, {branch.name: branch.parameters for branch in points}, max_evaluations)
    if not candidates.shared and not candidates.has_private:
        raise UserError("RUNS: all have the very same parameters, so there is nothing to merge.")
    search = Search(
        num_points=len(points),
        num_branches=len(branches),
        num_tasks=len(run.data),
        has_shared=bool(candidates.shared),
        has_private=candidates.has_private,
        evaluate=candidates.evaluate,
        objective=candidates.objective,
        task_value=candidates.task_value,
    )
    search.run()
    if search.best is None:
        raise UserError(f"RUNS: none has a validation loss that is a number, {branches[0].folder} for one.")
    candidates.put(search.best)
    run.keep_validation(search.validation)
    write_merge(run, candidates, search, branches, start)
    save(run, None)
    finish(run, settings, evaluate_base_model(prepared, settings, "test"))
    correct_peak(run.output_dir / "results.json", branches)


def write_merge(
    run: Run, candidates: Candidates, search: Search, branches: Sequence[Branch], start: Branch | None
) -> None:
    """Says what has been chosen: in ``merge.json``, as the last evaluation of ``metrics.jsonl``, and in words."""
    assert run.log is not None and search.best is not None
    points = [*branches, *([start] if start else [])]
    chosen: dict[str, Any] = candidates.described(search.best)
    content = {
        "schema": 1,
        "select": run.options.select_by,
        "objective": search.value,
        **chosen,
        "runs": {
            branch.name: {"folder": str(branch.folder), "objective": value}
            for branch, value in zip(points, search.values_P, strict=True)
        },
        "num_evaluations": candidates.num_evaluations,
        "max_evaluations": candidates.max_evaluations,
    }
    write_atomically(run.output_dir / "merge.json", to_json(content, indent=2) + b"\n")
    run.log.evaluation(run.state, "merged", run.names, search.validation)
    best = max(range(len(branches)), key=lambda place: search.values_P[place])
    run.log.say(
        f"Merged by {run.options.select_by}: {search.value:.4f}; the best branch alone, {branches[best].name}: "
        f"{search.values_P[best]:.4f} ({candidates.num_evaluations} mixtures validated)"
    )
    for name, weights in {"weights": chosen.get("weights"), **chosen.get("private", {})}.items():
        if weights:
            run.log.say(f"  {name}: {', '.join(f'{weight:.3g} {branch}' for branch, weight in weights.items())}")


def correct_peak(path: Path, branches: Sequence[Branch]) -> None:
    """The most memory that any part took: training a branch, or merging them."""
    results = read_results(path)
    peaks = [item.cost.peak_memory_bytes or 0 for item in (results, *(branch.results for branch in branches))]
    write_results(path, replace(results, cost=replace(results.cost, peak_memory_bytes=max(peaks))))
