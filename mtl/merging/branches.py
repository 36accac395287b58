"""The runs that are merged: read, compared, and what they have cost together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mtl.checkpoint import Checkpoint
from mtl.config_keys import differences
from mtl.errors import UserError
from mtl.reporting.results import Results, read_results
from mtl.resume import end_of
from mtl.run import Run, RunState
from mtl.sweep_folder import is_sweep, jobs_of


@dataclass(frozen=True)
class Branch:
    """A finished run: its folder, what it is called here, its end and its results."""

    folder: Path
    name: str
    end: Checkpoint
    results: Results

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The trainable ones."""
        values: Mapping[str, Tensor] = self.end.state["parameters"]
        return values

    @property
    def state(self) -> RunState:
        """Of the run at its end."""
        return RunState(**self.end.state["run"])


def expanded(paths: Sequence[Path]) -> list[Path]:
    """Folders of runs, with the jobs of a sweep in its place.

    Raises:
        UserError: A sweep has a job that has not finished, or a folder is named twice.
    """
    folders: list[Path] = []
    for path in paths:
        if not is_sweep(path):
            folders.append(path)
            continue
        for job in jobs_of(path):
            if job.status != "finished":
                raise UserError(
                    f"{path}: its job {job.name} is {job.status}. Finish the sweep with sweep.resume=true, or name the "
                    "runs one by one."
                )
            folders.append(path / job.name)
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise UserError(f"{folders[place]}: is named twice. Name each run once.")
    return folders


def read_branches(folders: Sequence[Path]) -> list[Branch]:
    """The runs, by the names of their folders where these tell them apart."""
    names = [folder.resolve().name for folder in folders]
    return [
        read_branch(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_branch(folder: Path, name: str) -> Branch:
    """A finished run.

    Raises:
        UserError: It has not finished, or its newest checkpoint is not the end of a stage.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: must be the folder of a run, and has no config.yaml. Give a finished run.")
    if not (folder / "results.json").is_file():
        raise UserError(f"{folder}: has not finished (there is no results.json). Let it end first.")
    return Branch(folder, name, end_of(folder, str(folder)), read_results(folder / "results.json"))


def check_alike(branches: Sequence[Branch]) -> None:
    """Refuses runs whose parameters are not points of one space: of another model, other tasks or another layout.

    Raises:
        UserError: Names the run and the first difference from the first one.
    """
    first, *others = branches
    for other in others:
        before, after = first.end.state["identity"], other.end.state["identity"]
        layouts = [
            {key: value for key, value in identity["config"].items() if shapes_layout(key)}
            for identity in (before, after)
        ]
        for what, found in (
            ("tasks", differences(before["tasks"], after["tasks"])),
            ("base model", differences(before["model"], after["model"])),
            ("adapters", differences(*layouts)),
            ("parameters", differences(before["parameters"], after["parameters"])),
        ):
            if found:
                raise UserError(
                    f"{other.folder}: has other {what} than {first.folder}: {found[0]} (or the order differs). Merge "
                    "runs of one model, one list of tasks with the same data, and one layout."
                )


def shapes_layout(key: str) -> bool:
    """Whether a config key decides what the trainable parameters mean; dropout acts in training only."""
    return key.startswith("adapters.") and key != "adapters.lora_dropout"


def check_fits(branch: Branch, identity: Mapping[str, Any]) -> None:
    """Refuses runs that this machine's model and data are not those of, by what was built from their config.

    Raises:
        UserError: Names the first difference.
    """
    saved = branch.end.state["identity"]
    for key in ("tasks", "model", "parameters"):
        found = differences(saved[key], identity[key])
        if found:
            raise UserError(
                f"{branch.folder}: its config.yaml now leads to other {key}: {found[0]}. Put model and data back as "
                "they were, and merge in the folder where the run was trained."
            )


def check_start(start: Branch, branches: Sequence[Branch]) -> None:
    """Refuses a start that a branch has not gone on from.

    Raises:
        UserError: Names both.
    """
    had = start.state.history
    for branch in branches:
        if branch.state.step < start.state.step or branch.state.history[: len(had)] != had:
            raise UserError(
                f"--start={start.folder}: is not what {branch.folder} began with. Give the run of its resume_from, or "
                "no --start."
            )


def add_costs(run: Run, branches: Sequence[Branch], start: Branch | None) -> None:
    """Gives the run all that its branches have had; what they share, the start, counts once."""
    states = [branch.state for branch in branches]
    begun = start.state if start else RunState(num_tasks=len(run.data))
    state = run.state
    state.stage = len(run.stages)
    state.history = [
        *begun.history,
        *(
            {**record, "branch": branch.name}
            for branch, of in zip(branches, states, strict=True)
            for record in of.history[len(begun.history) :]
        ),
    ]
    for key in ("step", "tokens", "training_seconds", "total_seconds", "num_skipped_steps"):
        shared = getattr(begun, key)
        setattr(state, key, shared + sum(getattr(of, key) - shared for of in states))
    for key in ("examples_seen_T", "target_tokens_T"):
        shared_T = getattr(begun, key)
        of_TB = zip(*(getattr(of, key) for of in states), strict=True)
        added_T = [shared + sum(each - shared for each in of_B) for shared, of_B in zip(shared_T, of_TB, strict=True)]
        setattr(state, key, added_T)
    run.cursors.load_state_dict({"examples_seen": state.examples_seen_T, "limits": {}, "limited": {}})
    run.started -= state.total_seconds
