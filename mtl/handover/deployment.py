"""What can be deployed: the adapters of a finished run, or an export of them; read from files, nothing is loaded."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mtl.construct import build, did_you_mean
from mtl.errors import UserError
from mtl.models.load import ModelSettings, default_cache_dir
from mtl.reporting.json_files import to_json, write_atomically
from mtl.reporting.results import read_predictions, read_results
from mtl.sweep_folder import is_sweep, jobs_of
from mtl.tasks import Task

EXPORT_FILE = "mtl_export.json"
SCHEMA = 1
FORMATS = ("adapter", "merged", "gguf-ready")


@dataclass(frozen=True)
class Options:
    """What an evaluation was done with; the names are those of the config."""

    seed: int
    max_length: int
    too_long: str
    max_eval_examples: int | None
    max_test_examples: int | None
    eval_micro_batch_tokens: int
    mixed_precision: str
    use_cpu: bool


@dataclass(frozen=True)
class DeployedTask:
    """A task and what belongs to it.

    Args:
        task: As in the config of the run.
        adapter: The folder of its adapter; ``None`` where the model itself has learnt the task.
        metric: The metric of the run; ``None`` for plain text, which has no answers.
        test: The run's scores and loss on test data, and how many examples these were.
        multiline: Whether some right answers have several lines, so that a generated text is not cut at the first.
    """

    task: Task
    adapter: Path | None
    metric: str | None
    test: Mapping[str, float | None]
    multiline: bool


@dataclass(frozen=True)
class Deployment:
    """A model, and what turns it into the model of each task.

    Args:
        folder: The run or export that it was read from.
        format: One of ``FORMATS``, or ``run``.
        base: The model of the run before training.
        model: What is loaded: the base for adapters, else the model that has learnt the tasks.
        tokenizer: Where the tokenizer is.
        tasks: By their names.
        options: Of the run's evaluation.
        strategy: The run's levers.
        seed: The run's.
        cache_dir: The folder of caches.
    """

    folder: Path
    format: str
    base: ModelSettings
    model: ModelSettings
    tokenizer: ModelSettings
    tasks: Mapping[str, DeployedTask]
    options: Options
    strategy: Mapping[str, Any]
    seed: int
    cache_dir: Path

    def named(self, names: Sequence[str]) -> list[str]:
        """These tasks, or all of them if none is named.

        Raises:
            UserError: There is no such task, or it has no adapter.
        """
        chosen = list(dict.fromkeys(unicodedata.normalize("NFC", name) for name in names)) or list(self.tasks)
        for name in chosen:
            if name not in self.tasks:
                raise UserError(
                    f"--task {name}: {self.folder} has no such task.{did_you_mean(name, self.tasks)} "
                    f"There are: {', '.join(self.tasks)}."
                )
            adapter = self.tasks[name].adapter
            if adapter is not None and not (adapter / "adapter_config.json").is_file():
                raise UserError(
                    f"{adapter}: must be the adapter of task {name!r}, and there is none. Put the folder back, or "
                    "train again."
                )
        return chosen

    def one(self, name: str | None) -> str:
        """The named task; without a name the only one.

        Raises:
            UserError: There are several, or none of this name.
        """
        if name is None and len(self.tasks) > 1:
            raise UserError(f"--task: must be given, since there are several: {', '.join(self.tasks)}.")
        return self.named([] if name is None else [name])[0]


def open_deployment(folder: Path) -> Deployment:
    """Reads a run, an export, or a folder that holds exports of adapters on one base model.

    Raises:
        UserError: It is none of these, is not finished, or damaged.
    """
    if (folder / EXPORT_FILE).is_file():
        return _of_export(folder)
    if (folder / "config.yaml").is_file():
        return _of_run(folder)
    if is_sweep(folder):
        finished = [job.name for job in jobs_of(folder) if job.status == "finished"]
        raise UserError(f"{folder}: is a sweep. Name one of its finished runs: {', '.join(finished) or 'none yet'}.")
    exports = sorted(file.parent for file in folder.glob(f"*/{EXPORT_FILE}"))
    if not exports:
        raise UserError(f"{folder}: must be the folder of a finished run or of an export, and is neither. Correct it.")
    return _together(folder, [_of_export(export) for export in exports])


def open_run(folder: Path) -> Deployment:
    """Reads a run.

    Raises:
        UserError: It is none, is not finished, or damaged.
    """
    if (folder / EXPORT_FILE).is_file():
        raise UserError(f"{folder}: is an export already. Name the run that it was made of.")
    if not (folder / "config.yaml").is_file() and not is_sweep(folder):
        raise UserError(
            f"{folder}: must be the folder of a finished run, with config.yaml and results.json. Correct it."
        )
    return open_deployment(folder)


def write_export_file(folder: Path, deployment: Deployment, tasks: Sequence[str], kind: str) -> None:
    """Writes what :func:`open_deployment` needs of an export beside what it loads.

    Args:
        folder: The export.
        deployment: What it was made of.
        tasks: Those that it is for.
        kind: One of ``FORMATS``.
    """
    described = {}
    for name in tasks:
        deployed = deployment.tasks[name]
        fields = {key: value for key, value in asdict(deployed.task).items() if key != "name"}
        described[name] = {
            "task": fields,
            "metric": deployed.metric,
            "test": deployed.test,
            "multiline": deployed.multiline,
        }
    content = {
        "schema": SCHEMA,
        "format": kind,
        "base": asdict(deployment.base),
        "dtype": deployment.model.dtype,
        "options": asdict(deployment.options),
        "strategy": deployment.strategy,
        "seed": deployment.seed,
        "tasks": described,
    }
    write_atomically(folder / EXPORT_FILE, to_json(content, indent=2) + b"\n")


def _of_run(folder: Path) -> Deployment:
    if not (folder / "results.json").is_file():
        raise UserError(
            f"{folder}: the run has not finished (there is no results.json). Let it end: the command it was started "
            f"with, output_dir={folder} resume_from_checkpoint=auto."
        )
    results = read_results(folder / "results.json")
    path = folder / "config.yaml"
    config = _config(path)
    base = build(ModelSettings, "model", config["model"])
    tasks = {}
    for key, values in config["tasks"].items():
        task = build(Task, f"tasks.{key}", values, name=key)
        if task.name in results.tasks:  # a run on one task alone keeps the config of all
            tasks[task.name] = task
    whole = folder / "model"
    model = base
    if whole.is_dir():
        # Half-precision weights were trained, and saved, in float32.
        model = replace(base, dtype="float64" if base.dtype == "float64" else "float32")
        model = replace(model, name_or_path=str(whole), revision=None, gradient_checkpointing=False)
    deployed = {
        name: DeployedTask(
            task=task,
            adapter=None if whole.is_dir() else folder / "adapters" / name,
            metric=results.tasks[name].metric,
            test=results.tasks[name].test,
            multiline=_multiline(folder / "predictions" / f"{name}.jsonl"),
        )
        for name, task in tasks.items()
    }
    values = {key: config[key] for key in Options.__dataclass_fields__}
    return Deployment(
        folder=folder,
        format="run",
        base=base,
        model=model,
        tokenizer=base,
        tasks=deployed,
        options=build(Options, "config", values),
        strategy=results.strategy,
        seed=results.seed,
        cache_dir=Path(config["cache_dir"]).expanduser() if config["cache_dir"] else default_cache_dir(),
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: must be the config of the run, found: {' '.join(str(error).split())}.") from error
    needed = {"model", "tasks", "cache_dir", *Options.__dataclass_fields__}
    if not isinstance(config, dict) or not needed <= config.keys():
        raise UserError(f"{path}: must be the config that the run has left. Put it back.")
    return config


def _multiline(predictions: Path) -> bool:
    return predictions.is_file() and any("\n" in item.reference.strip() for item in read_predictions(predictions))


def _of_export(folder: Path) -> Deployment:
    path = folder / EXPORT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind, tasks = content["format"], content["tasks"]
        if content["schema"] != SCHEMA or kind not in FORMATS:
            raise UserError(f"{path}: must be of schema {SCHEMA}, found {content['schema']}. Export again.")
        base = build(ModelSettings, f"{path}: base", content["base"])
        own = replace(base, name_or_path=str(folder), revision=None, gradient_checkpointing=False)
        deployed = {
            name: DeployedTask(
                task=build(Task, f"{path}: tasks.{name}.task", values["task"], name=name),
                adapter=folder if kind == "adapter" else None,
                metric=values["metric"],
                test=values["test"],
                multiline=values["multiline"],
            )
            for name, values in tasks.items()
        }
        return Deployment(
            folder=folder,
            format=kind,
            base=base,
            model=base if kind == "adapter" else replace(own, dtype=content["dtype"]),
            tokenizer=own,
            tasks=deployed,
            options=build(Options, f"{path}: options", content["options"]),
            strategy=content["strategy"],
            seed=content["seed"],
            cache_dir=default_cache_dir(),
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: must be as mtl export has written it, found: {error!r}. Export again.") from error


def _together(folder: Path, exports: Sequence[Deployment]) -> Deployment:
    first = exports[0]
    tasks: dict[str, DeployedTask] = {}
    for export in exports:
        shared = tasks.keys() & export.tasks.keys()
        if export.format != "adapter" or export.base != first.base or shared:
            names = ", ".join(item.folder.name for item in exports)
            raise UserError(
                f"{folder}: holds exports that don't go onto one model, or are for the same task. Name one of them: "
                f"{names}."
            )
        tasks |= export.tasks
    return replace(first, folder=folder, tasks=tasks)
