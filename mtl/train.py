"""``mtl train``: from a config and overrides to settings. The only file that knows Hydra."""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mtl.errors import UserError

USAGE = """usage: mtl train [options] [overrides]

Fine-tunes one language model on several tasks. Without overrides: eight tasks that come with the package, the default
model, LoRA shared and per task.

options:
  -m, --multirun          a sweep: every combination of comma-separated values, such as strategy=pcgrad,uncertainty
  --config-dir DIR        a folder of your own configs, searched beside the package's
  --cfg                   print the resulting config and stop
  --debug                 show tracebacks of mistakes, too
  -h, --help              this text

overrides, as in Hydra (the config of a run is conf/train.yaml, groups are the folders beside it):
  tasks=[sentiment,g2p]                           some of the tasks that come with the package
  tasks=none tasks.mine.path=data/mine            your own task: a folder with train/val/test as JSONL, CSV or Parquet
  model.name_or_path=<hub id, folder or .gguf>    another model
  strategy=temperature|performance|uncertainty|pcgrad   a preset; or each lever by itself:
  sampler=... weighter=... surgery=... adapters=... stages=...
  max_steps=100 batch_size=16 learning_rate=2e-4 max_length=1024 seed=0
  output_dir=outputs/mine resume_from_checkpoint=auto

on several processes: accelerate launch -m mtl.train [overrides]
"""
GROUPS = {
    "adapters": ("model", "num_tasks"),
    "sampler": ("sizes",),
    "weighter": (),
    "surgery": (),
    "optimizer": ("params",),
    "scheduler": ("optimizer",),
}


@dataclass
class RunConfig:
    """The keys that a config may have at the top, and their types; a misspelled key fails."""

    seed: int = MISSING
    output_dir: str | None = MISSING
    cache_dir: str | None = MISSING
    resume_from_checkpoint: str | None = MISSING
    num_epochs: float = MISSING
    max_steps: int | None = MISSING
    batch_size: int = MISSING
    learning_rate: float | None = MISSING
    warmup_ratio: float = MISSING
    max_grad_norm: float | None = MISSING
    share: str = MISSING
    allow_ineffective: bool = MISSING
    max_row_bytes: float = MISSING
    max_length: int = MISSING
    too_long: str = MISSING
    micro_batch_tokens: int = MISSING
    packing: bool = MISSING
    mixed_precision: str = MISSING
    use_cpu: bool = MISSING
    evals_per_stage: int = MISSING
    eval_steps: int | None = MISSING
    eval_scores: bool = MISSING
    max_eval_examples: int | None = MISSING
    max_test_examples: int | None = MISSING
    early_stopping_patience: int | None = MISSING
    save_total_limit: int = MISSING
    model: Any = None
    tasks: Any = None
    adapters: Any = None
    sampler: Any = None
    weighter: Any = None
    surgery: Any = None
    optimizer: Any = None
    scheduler: Any = None
    stage_order: list[str] = MISSING
    stages: Any = None
    strategy: Any = None
    experiment: Any = None


def register_schema() -> None:
    """Makes the schema known to Hydra.

    Groups stay open, so that ``tasks.mine.path=...`` needs no plus sign; what they hold is checked against the
    arguments of the class it is meant for, which can say what there is.
    """
    schema = OmegaConf.structured(RunConfig)
    for group in ("tasks", "stages", "model", *GROUPS):
        schema[group] = DictConfig({}, flags={"struct": False})
    ConfigStore.instance().store("schema", node=schema)


def config_dir() -> Path:
    """Where the configs are: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``mtl train`` and returns the exit code: 0, 1 for a failure, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="mtl train", add_help=False)
    for flags in (("-h", "--help"), ("-m", "--multirun"), ("--cfg",), ("--debug",)):
        parser.add_argument(*flags, action="store_true")
    parser.add_argument("--config-dir")
    parser.add_argument("overrides", nargs="*")
    arguments, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if arguments.help:
        print(USAGE, end="")
        return 0
    if unknown:
        return report(UserError(f"Unknown option {unknown[0]}. See mtl train --help."), debug=arguments.debug)
    register_schema()
    try:
        if arguments.multirun:
            return sweep(arguments)
        config = composed(arguments.overrides, arguments.config_dir)
        if arguments.cfg:
            print(OmegaConf.to_yaml(config), end="")
            return 0
        return job(config, default_folder("outputs"), debug=arguments.debug)
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        return report(error, debug=arguments.debug)


def default_folder(kind: str) -> Path:
    """A folder named by the time."""
    return Path(kind) / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")


def composed(overrides: Sequence[str], own_configs: str | None) -> DictConfig:
    """The config that the overrides give."""
    searched = [f"hydra.searchpath=[{Path(own_configs).resolve().as_uri()}]"] if own_configs else []
    if own_configs and not Path(own_configs).is_dir():
        raise UserError(f"--config-dir={own_configs}: must be a folder. Give the folder that holds your configs.")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=[*searched, *overrides])


def job(config: DictConfig, folder: Path, *, debug: bool) -> int:
    """Runs one job; a failure is reported and becomes the exit code, so that a sweep goes on."""
    try:
        settings = settings_from(config, folder)
        from mtl.job import run_job

        run_job(settings)
    except (UserError, OmegaConfBaseException) as error:
        return report(error, debug=debug)
    return 0


def report(error: Exception, *, debug: bool) -> int:
    """Prints a mistake as one line, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        if debug:
            traceback.print_exception(error)
        print(f"mtl: error: {one_line(error)}", file=sys.stderr, flush=True)
    return 2


def one_line(error: Exception) -> str:
    """The message of an error of ours, of Hydra or of OmegaConf, in one line."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    parts = [str(error)]
    cause = error.__cause__
    if cause is not None and str(cause).splitlines()[0] not in parts[0]:
        parts.append(str(cause).splitlines()[0])
    text = " ".join(" ".join(parts).split())
    return text.replace("To append to your config use +", "The option does not exist; see mtl train --cfg. Given: ")


def sweep(arguments: argparse.Namespace) -> int:
    """Runs every combination of the overrides' values as a job of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "A sweep can't run inside accelerate launch: each process would sweep on its own and mix up the jobs. "
            f"Run: mtl train -m {' '.join(arguments.overrides)}"
        )
    overrides = OverridesParser.create().parse_overrides(arguments.overrides)
    fixed = [item.key_or_group for item in overrides if not item.is_sweep_override()]
    named_by = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"  # folders named by what varies
    own_configs = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    codes: list[int] = []

    @hydra_main(config_path=str(config_dir()), config_name="train", version_base="1.3")
    def run_one(config: DictConfig) -> None:
        codes.append(job(config, Path(HydraConfig.get().runtime.output_dir), debug=arguments.debug))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's own errors come to us instead of ending the process
    sys.argv = ["mtl train", "-m", *own_configs, *arguments.overrides, named_by]
    run_one()
    failed = sum(code != 0 for code in codes)
    if failed:
        print(f"{failed} of {len(codes)} jobs failed; their errors stand above.", file=sys.stderr)
    return max(codes, default=0)


def settings_from(config: DictConfig, folder: Path) -> Any:  # noqa: ANN401 - imported late: it needs torch
    """Turns a config into settings.

    Raises:
        UserError: A key is unknown to what it is meant for, or a value breaks a rule.
    """
    from mtl.models.load import ModelSettings, default_cache_dir
    from mtl.settings import Factories, Options, Settings
    from mtl.stages import Stage
    from mtl.tasks import Task, check_task_names

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    output_dir = Path(plain["output_dir"]).expanduser() if plain["output_dir"] else folder
    cache_dir = Path(plain["cache_dir"]).expanduser() if plain["cache_dir"] else default_cache_dir()
    plain["output_dir"] = str(output_dir)
    options = Options(**{key: plain[key] for key in inspect.signature(Options).parameters})
    tasks = [
        build(Task, f"tasks.{name}", {**(values or {}), "name": name}) for name, values in (plain["tasks"] or {}).items()
    ]
    check_task_names([task.name for task in tasks])
    names = [task.name for task in tasks]
    unknown = [name for name in plain["stage_order"] if name not in plain["stages"]]
    if unknown:
        raise UserError(f"stage_order: {unknown[0]} is not in stages, which has {', '.join(plain['stages'])}.")
    stages = [build(Stage, f"stages.{name}", {**plain["stages"][name], "name": name}) for name in plain["stage_order"]]
    makers = {group: Maker(group, config[group], names) for group in GROUPS}
    seed = options.seed
    factories = Factories(
        layout=lambda model, num_tasks: makers["adapters"](model=model, num_tasks=num_tasks, seed=seed),
        sampler=lambda sizes, names: makers["sampler"](sizes=sizes, names=names, seed=seed),
        weighter=lambda names: makers["weighter"](num_tasks=len(names), names=names, seed=seed),
        surgery=lambda: makers["surgery"](seed=seed),
        optimizer=lambda params, lr: makers["optimizer"](params=params, lr=lr),
        scheduler=lambda optimizer, warmup, total: makers["scheduler"](
            optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=total
        ),
    )
    strategy = {group: makers[group].name for group in ("sampler", "weighter", "surgery", "adapters")}
    settings = Settings(
        options=options,
        model=build(ModelSettings, "model", plain["model"]),
        tasks=tasks,
        stages=stages,
        factories=factories,
        output_dir=output_dir,
        cache_dir=cache_dir,
        resume_from_checkpoint=plain["resume_from_checkpoint"],
        config=plain,
        strategy={**strategy, "stages": "+".join(plain["stage_order"])},
    )
    settings.check()
    return settings


class Maker:
    """Makes objects of one group from its ``_target_``, its options, and what the run supplies.

    The run's values go to the constructor arguments of those names, and to no others, so that a class takes what it
    needs. Options that map task names to values are cut to the tasks at hand: a stage may have some of them only.

    Args:
        group: Place in the config, for messages.
        node: The group's config.
        names: The run's tasks.
    """

    def __init__(self, group: str, node: DictConfig, names: Sequence[str]) -> None:
        from hydra.utils import instantiate

        self._group = group
        self._all_names = set(names)
        try:
            partial = instantiate(node, _partial_=True, _convert_="all")
        except HydraException as error:
            cause = error.__cause__ or error
            raise UserError(f"{group}._target_={node.get('_target_')}: {str(cause).splitlines()[0]}") from error
        if not isinstance(partial, functools.partial):
            raise UserError(f"{group}: must be a class with its options. Take one of the files of conf/{group}.")
        self._make: Callable[..., Any] = partial.func
        self._options: dict[str, Any] = dict(partial.keywords)
        self.name: str = getattr(partial.func, "__name__", str(partial.func))
        self._accepted = inspect.signature(partial.func).parameters
        unknown = [key for key in self._options if key not in self._accepted]
        if unknown:
            known = [key for key in self._accepted if key not in ("sizes", "names", "num_tasks", "seed", *GROUPS[group])]
            raise UserError(f"{group}.{unknown[0]}: {self.name} has no such option. It has: {', '.join(known) or 'none'}.")

    def __call__(self, **supplied: Any) -> Any:  # noqa: ANN401
        options = dict(self._options)
        if "names" in supplied:
            for key, value in options.items():
                if isinstance(value, Mapping) and value and value.keys() <= self._all_names:
                    options[key] = {name: item for name, item in value.items() if name in supplied["names"]}
        supplied = {key: value for key, value in supplied.items() if key in self._accepted}
        try:
            return self._make(**supplied, **options)
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._group}.{error}") from error


def build(kind: type[Any], place: str, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Makes a dataclass from a mapping; an unknown or missing key becomes a clear line."""
    known = inspect.signature(kind).parameters
    unknown = [key for key in values if key not in known]
    if unknown:
        options = ", ".join(key for key in known if key != "name")
        raise UserError(f"{place}.{unknown[0]}: no such option. There are: {options}.")
    missing = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in values]
    if missing:
        raise UserError(f"{place}.{missing[0]} must be given.")
    return kind(**values)


if __name__ == "__main__":
    sys.exit(main())
