"""``mtl train -m``: every combination of the overrides' values, or what a search proposes, as a job of its own."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl import ranks
from mtl.composition import completed, composed, composed_with_hydra, config_dir, job_name, parsable, settings_of
from mtl.config_keys import config_differences
from mtl.construct import build
from mtl.errors import UserError
from mtl.evaluation.objectives import OBJECTIVES
from mtl.launch import JobFailed, new_folder
from mtl.report.objective import objective
from mtl.reporting.references import reference_scores
from mtl.start import Ending, report, run
from mtl.sweep_folder import (
    CHARTS,
    SweepJob,
    SweepRecord,
    clear_failure,
    jobs_of,
    link_charts,
    open_sweep,
    read_sweep,
    record_failure,
    unfinished,
)

BEST = "optimization_results.yaml"  # Optuna's, for Hydra
OWN_KEYS = ("sweep.dir", "sweep.resume")


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep goes about its jobs; every field is a key of ``sweep``.

    Args:
        dir: Its folder; ``hydra.sweep.dir`` if not given.
        resume: Whether to finish the sweep in ``dir``: what is finished stays, the rest goes on or begins. What the
            command says comes on top of what the sweep was asked for.
        over: What is swept over unless the command says otherwise: override by key. ``{task}`` in a key stands for
            every task of the run, one after the other; ``{tasks}`` in a value for all of them.
        objective: What a search maximises.
        reference: Folder of the single-task runs that some objectives need.
    """

    dir: str | None = None
    resume: bool = False
    over: Mapping[str, str] = field(default_factory=dict)
    objective: str = "mean_loss_ratio"
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UserError(f"sweep.objective={self.objective}: must be one of {', '.join(OBJECTIVES)}.")
        if self.objective.endswith("change") and self.reference is None:
            raise UserError(
                f"sweep.objective={self.objective}: compares with single-task runs. Set sweep.reference=<their folder>."
            )
        if self.resume and self.dir is None:
            raise UserError("sweep.resume=true: needs the folder of the sweep to finish. Set sweep.dir=<folder>.")


def sweep(overrides: Sequence[str], own_configs: str | None, *, debug: bool) -> int:
    """Runs the jobs; returns the highest exit code among them."""
    if ranks.is_rank():
        raise UserError(
            "A sweep can't run inside accelerate launch: each process would sweep on its own and mix up the jobs. Run: "
            f"mtl train -m launch.num_processes={os.environ['WORLD_SIZE']} {' '.join(overrides)}"
        )
    overrides, own_configs = taken_up(overrides, own_configs)
    given = list({item.get_key_element(): item for item in parsed(overrides)}.values())  # the last of a key counts
    check_keys(given)
    first = composed_with_hydra([values_of(item)[0] for item in given], own_configs)
    config: Any = OmegaConf.to_container(completed(first))
    options = build(SweepOptions, "sweep", config["sweep"])
    asked = {item.get_key_element() for item in given}
    added = [
        parsable(f"{key}={value}")
        for key, value in ranges(options.over, list(config["tasks"] or {}))
        if key not in asked
    ]
    everything = [*given, *parsed(added)]
    check_values(everything, own_configs)
    varied = [item for item in everything if item.is_sweep_override()]
    searches = first.hydra.runtime.choices["hydra/sweeper"] != "basic"
    if searches:
        check_search(varied, options)
    fixed = [item for item in everything if not item.is_sweep_override()]
    jobs = {} if searches else {job_name(",".join(sorted(own))): own for own in product(*map(values_of, varied))}
    record = SweepRecord(
        [text_of(item) for item in given if item.get_key_element() not in OWN_KEYS], own_configs, list(jobs)
    )
    wanted = Path(options.dir or first.hydra.sweep.dir).expanduser()
    with nullcontext(wanted) if options.dir else new_folder(wanted) as folder:
        if options.resume:
            check_finished(folder, {name: [*map(text_of, fixed), *own] for name, own in jobs.items()}, own_configs)
        open_sweep(folder, record, resume=options.resume)
        arguments = [
            *(["--config-dir", own_configs] if own_configs else []),
            *map(text_of, everything),
            # folders named by what varies
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(item.key_or_group for item in fixed)}]",
            "hydra.sweep.dir='{}'".format(str(folder).replace("'", "\\'")),
        ]
        try:
            code = run_jobs(arguments, options, searches=searches, debug=debug)
        finally:
            found = tell(folder, options.objective)
        return code or int(any(job.status != "finished" for job in found))


def taken_up(overrides: Sequence[str], own_configs: str | None) -> tuple[list[str], str | None]:
    """The overrides, after those of the sweep that they resume, if they do."""
    given = {key: value.strip("'\"") for key, _, value in (text.partition("=") for text in overrides)}
    if given.get("sweep.resume", "").lower() != "true" or "sweep.dir" not in given:
        return list(overrides), own_configs
    record = read_sweep(Path(given["sweep.dir"]).expanduser())
    return [*record.overrides, *overrides], own_configs or record.config_dir


def parsed(overrides: Sequence[str]) -> list[Override]:
    """As Hydra reads them."""
    return OverridesParser.create().parse_overrides(list(overrides))


def text_of(item: Override) -> str:
    """As it was given."""
    return item.input_line or ""


def values_of(item: Override) -> list[str]:
    """Overrides of a single value each: all of a choice or a range, and the ends of an interval."""
    if not item.is_sweep_override():
        return [text_of(item)]
    key, value = item.get_key_element(), item.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={single}" for single in item.sweep_string_iterator()]


def ranges(over: Mapping[str, str], tasks: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The keys that ``over`` sweeps and their values, with the tasks' names filled in."""
    for key, value in over.items():
        names = tasks if "{task}" in key else [""]
        for name in names:
            yield key.replace("{task}", name), str(value).replace("{tasks}", ",".join(tasks))


def check_keys(overrides: Sequence[Override]) -> None:
    """Refuses what a sweep decides itself."""
    for item in overrides:
        key = item.get_key_element()
        if key == "output_dir" and not item.is_delete():
            raise UserError(
                f"{item.input_line}: the jobs of a sweep have folders of their own. Set sweep.dir=<folder>."
            )
        if key.startswith("sweep.") and item.is_sweep_override():
            raise UserError(f"{item.input_line}: must be one value for the whole sweep.")


def check_values(overrides: Sequence[Override], own_configs: str | None) -> None:
    """Refuses a key or a choice that does not exist before anything is written or run, one value at a time."""
    values = [values_of(item) for item in overrides]
    first = [options[0] for options in values]
    composed(first, own_configs)
    for position, options in enumerate(values):
        for option in options[1:]:
            composed([*first[:position], option, *first[position + 1 :]], own_configs)


def check_search(varied: Sequence[Override], options: SweepOptions) -> None:
    """Refuses what a search can't be about or go by, before anything is trained."""
    for item in varied:
        if item.get_key_element() == "seed":
            raise UserError(
                f"{item.input_line}: a search would find the luckiest seed. Give one, and compare what it finds over "
                "several."
            )
    if options.reference and options.objective.endswith("change"):
        reference_scores(options.reference, "sweep.reference")


def check_finished(folder: Path, jobs: Mapping[str, Sequence[str]], own_configs: str | None) -> None:
    """Refuses to resume a sweep with overrides that its first finished job did not have: the others had the same.

    Otherwise each job would be refused by itself, and the mistake remembered.
    """
    for name, overrides in jobs.items():
        if (folder / name / "results.json").is_file():
            has_finished(folder / name, settings_of(composed(overrides, own_configs), folder / name).config)
            return


def run_jobs(arguments: Sequence[str], options: SweepOptions, *, searches: bool, debug: bool) -> int:
    """Hands the jobs to Hydra's sweeper and launcher; returns the highest exit code among those of this process."""
    # Slurm's launcher asks a job to stop before its time is up; this signal is one that jobs answer by saving.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "TERM")
    sweeper, codes = os.getpid(), list[int]()

    @hydra_main(config_path=str(config_dir()), config_name="train", version_base="1.3")
    def run_one(config: DictConfig) -> float | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        print(f"Job {HydraConfig.get().job.num + 1}: {folder.name}", flush=True)
        ending = attempt(completed(config), folder, debug=debug)
        if ending.code and os.getpid() != sweeper:
            raise JobFailed(ending.code, HydraConfig.get().sweep.dir)
        codes.append(ending.code)
        if ending.code > 128:
            raise SystemExit(ending.code)  # stopped by a signal, which is meant for the sweep
        return value_of(folder, options) if searches and not ending.code else None

    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's own errors come to us instead of ending the process
    sys.argv = ["mtl train", "-m", *arguments]
    try:
        run_one()
    except JobFailed as error:
        print(f"mtl: error: {error}", file=sys.stderr)
        return error.code
    except BrokenProcessPool:
        print(
            "mtl: error: A process with a job was killed (as the system does when memory runs out), and the others "
            "were stopped. Go on with fewer at a time: hydra.launcher.n_jobs.",
            file=sys.stderr,
        )
        return 1
    except ValueError as error:
        if "No trials are completed" not in str(error):  # Optuna's, which then has no best one
            raise
        print("mtl: error: The search has found nothing: no trial has a finite objective.", file=sys.stderr)
        return max(codes, default=0) or 1
    return max(codes, default=0)


def value_of(folder: Path, options: SweepOptions) -> float | None:
    """A job's objective; None, which is a trial that failed, if it is not finite. One that has none ends the search."""
    try:
        value = objective(folder, options.objective, options.reference)
    except UserError as error:
        report(error, debug=False)
        raise SystemExit(2) from error
    return value if isfinite(value) else None


def attempt(config: DictConfig, folder: Path, *, debug: bool) -> Ending:
    """Runs a job, or goes on with it, unless it has finished; leaves word in its folder if it fails."""
    clear_failure(folder)
    try:
        link_charts(folder)
        settings = settings_of(config, folder)
        if has_finished(folder, settings.config):
            print(f"{folder.name}: has finished before")
            return Ending()
        ending = run(replace(settings, resume_from_checkpoint="auto"), None, debug=debug)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        ending = Ending(2, report(error, debug=debug))
    except Exception as error:  # a defect or a full disk, say; the other jobs still run
        traceback.print_exc()
        ending = Ending(1, f"{type(error).__name__}: {error}")
    if ending.code:
        record_failure(folder, ending.code, ending.reason)
    return ending


def has_finished(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder holds the results of this config.

    Raises:
        UserError: It holds those of another.
    """
    if not (folder / "results.json").is_file():
        return False
    saved: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    changed = config_differences(saved, config)
    if changed:
        raise UserError(
            f"{folder}: holds the results of another config: {'; '.join(changed)}. Put it back, or choose another "
            "sweep.dir."
        )
    return True


def tell(folder: Path, objective_name: str) -> list[SweepJob]:
    """Says what became of the jobs, which it returns, and what to do next."""
    jobs = jobs_of(folder)
    lines = list(unfinished(jobs))
    quoted = shlex.quote(str(folder))
    if lines:
        print(f"{len(lines)} of {len(jobs)} jobs have not finished:", *lines, sep="\n", file=sys.stderr)
        print(f"To finish them: mtl train -m sweep.dir={quoted} sweep.resume=true", file=sys.stderr)
    if (folder / BEST).is_file():  # of a search
        best = OmegaConf.load(folder / BEST)
        values = " ".join(f"{key}={value}" for key, value in best.best_params.items())
        print(f"Best {objective_name}, {best.best_value:.4g}: {values}")
    if len(lines) < len(jobs):
        print(f"To compare those that have: mtl report {quoted}")
        print(f"Their charts: tensorboard --logdir {shlex.quote(str(folder / CHARTS))}")
    return jobs
