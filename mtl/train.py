"""``mtl train``: from a config and overrides to settings. The only file that knows Hydra."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError, YAMLError

from mtl.construct import Maker, did_you_mean
from mtl.errors import UserError
from mtl.overrides import escape, unescape
from mtl.schema import SUPPLIED, schema

if TYPE_CHECKING:
    from mtl.settings import Settings

USAGE = """usage: mtl train [options] [overrides]

Fine-tunes one language model on several tasks. Without overrides: eight tasks that come with the package, the default
model, LoRA shared and per task.

options:
  -m, --multirun          a sweep: every combination of comma-separated values, such as strategy=pcgrad,uncertainty
  --config FILE           the config.yaml that a run has left, to run it again: add output_dir=... and what shall differ
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
TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def config_dir() -> Path:
    """Where the configs are: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``mtl train`` and returns the exit code: 0, 1 for a failure, 2 for a user's mistake."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' progress bars would fill a log file
    parser = argparse.ArgumentParser(prog="mtl train", add_help=False, allow_abbrev=False, exit_on_error=False)
    for flags in (("-h", "--help"), ("-m", "--multirun"), ("--cfg",), ("--debug",)):
        parser.add_argument(*flags, action="store_true")
    parser.add_argument("--config")
    parser.add_argument("--config-dir")
    parser.add_argument("overrides", nargs="*")
    debug = False
    try:
        arguments, unknown = parser.parse_known_intermixed_args(sys.argv[1:] if argv is None else argv)
        debug = arguments.debug
        if arguments.help:
            print(USAGE, end="")
            return 0
        if unknown:
            raise UserError(f"Unknown option {unknown[0]}. See mtl train --help.")
        return run_or_sweep(arguments)
    except argparse.ArgumentError as error:
        return report(UserError(f"{error}. See mtl train --help."), debug=debug)
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        return report(error, debug=debug)


def run_or_sweep(arguments: argparse.Namespace) -> int:
    """Does what the arguments say."""
    arguments.overrides = [parsable(override) for override in arguments.overrides]
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise UserError(
            f"--config-dir={arguments.config_dir}: must be a folder. Give the folder that holds your configs."
        )
    if arguments.multirun:
        return sweep(arguments)
    config = composed(arguments.overrides, arguments.config_dir, arguments.config)
    if arguments.cfg:
        print(OmegaConf.to_yaml(config), end="")
        return 0
    return job(config, Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S"), debug=arguments.debug)


def parsable(override: str) -> str:
    """The override, escaped if it holds characters that Hydra does not know."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return escape(override)
    return override


def composed(overrides: Sequence[str], own_configs: str | None = None, run_config: str | None = None) -> DictConfig:
    """The config that the overrides give, over ``conf/train.yaml`` or over the ``config.yaml`` of a run.

    Raises:
        UserError: A choice or a key does not exist.
    """
    ConfigStore.instance().store("schema", node=schema())
    searched = [f"hydra.searchpath=[{Path(own_configs).resolve().as_uri()}]"] if own_configs else []
    if run_config:
        if not Path(run_config).is_file():
            raise UserError(f"--config={run_config}: must be a file. Give the config.yaml of a run.")
        node = OmegaConf.load(run_config)
        if not isinstance(node, DictConfig):
            raise UserError(f"--config={run_config}: must hold a mapping. Give the config.yaml of a run.")
        ConfigStore.instance().store("run", node={"defaults": ["schema", "_self_"], **node})
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            config = compose("run" if run_config else "train", overrides=[*searched, *overrides])
        except MissingConfigException as error:
            group, _, name = (error.missing_cfg_file or "").rpartition("/")
            choices = GlobalHydra.instance().config_loader().get_group_options(group)
            own = " For your own data: tasks=none tasks.mine.path=..." if group == "tasks" else ""
            raise UserError(
                f"{group}={name}: there is no such choice.{did_you_mean(name, choices)} "
                f"There are: {', '.join(choices)}.{own}"
            ) from error
        except ValueError as error:
            if isinstance(error, OmegaConfBaseException):
                raise
            # Hydra's own, where a group is set to something else than a choice
            raise UserError(f"{' '.join(overrides)}: {error}. Correct the overrides; see mtl train --help.") from error
    return completed(config)


def completed(config: DictConfig) -> DictConfig:
    """A composed config with escaped characters put back and every key of the schema in place."""
    answer = OmegaConf.merge(schema(), unescape(OmegaConf.to_container(config)))
    assert isinstance(answer, DictConfig)
    return answer


def job(config: DictConfig, folder: Path, *, debug: bool) -> int:
    """Runs one job; a mistake is reported and becomes the exit code, so that a sweep goes on."""
    try:
        from mtl.job import run_job  # needs torch, which takes its time

        run_job(settings_of(config, folder))
    except (UserError, OmegaConfBaseException) as error:
        return report(error, debug=debug)
    return 0


def settings_of(config: DictConfig, folder: Path) -> Settings:
    """The settings that a config means; ``folder`` is for the output where the config names none.

    Raises:
        UserError: A value breaks a rule.
    """
    from mtl.settings import settings_from

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    names = list(plain["tasks"] or {})
    makers = {group: maker(group, config[group], names) for group in SUPPLIED}
    return settings_from(plain, makers, folder)


def report(error: Exception, *, debug: bool) -> int:
    """Prints a mistake as one line, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        if debug:
            traceback.print_exception(error)
        print(f"mtl: error: {unescape(' '.join(explained(error).split()))}", file=sys.stderr, flush=True)
    return 2


def explained(error: Exception) -> str:
    """The message of an error of ours, of Hydra, OmegaConf or YAML, as place, rule, value found and remedy."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: must be of the form key=value. Put a value with commas, colons or brackets in quotes "
            "within quotes: \"key='a, b'\"."
        )
    cause = (error.__cause__ or error.__context__ or error) if isinstance(error, HydraException) else error
    file = re.match(r"In '(.+)': \w+ raised while composing", str(error))
    place = f"{file[1]}.yaml: " if file else ""
    first_line = (str(cause).splitlines() or [type(cause).__name__])[0]
    match cause:
        case ConfigKeyError(key="strategy" | "experiment") | ConfigAttributeError(key="strategy" | "experiment"):
            return f"{place}sets keys of its own folder only. Put '# @package _global_' in its first line."
        case ConfigKeyError() | ConfigAttributeError():
            known = [key for key in cause.parent_node or () if key != "hydra"]
            nearest = did_you_mean(str(cause.key), known)
            return f"{place}{cause.full_key}: there is no such option.{nearest} All of them: mtl train --cfg."
        case ValidationError() if kind := re.search(r"could not be converted to (\w+)", first_line):
            rule = TYPE_NAMES.get(kind[1], kind[1])
            return f"{place}{cause.full_key}={cause.value}: must be {rule}. Correct the value."
        case ValidationError() if "not Optional" in first_line:
            return f"{place}{cause.full_key}=null: must have a value. Leave it out for the default."
        case OmegaConfBaseException():
            return f"{place}{cause.full_key}: {first_line}. Correct the value."
        case MarkedYAMLError(problem_mark=mark) if mark:
            return f"{mark.name}:{mark.line + 1}: {cause.problem}. Correct the file."
        case ConfigCompositionException() if "No match in the defaults list" in str(cause):
            group = str(cause).split("'")[1]
            return f"{group}: this config has no such choice to override. Set options: {group}.<option>=<value>."
    return str(error)


def sweep(arguments: argparse.Namespace) -> int:
    """Runs every combination of the overrides' values as a job of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "A sweep can't run inside accelerate launch: each process would sweep on its own and mix up the jobs. "
            f"Run: mtl train -m {' '.join(arguments.overrides)}"
        )
    if arguments.config:
        raise UserError("-m and --config: a sweep starts from conf/train.yaml. Give what differs from it as overrides.")
    overrides = OverridesParser.create().parse_overrides(arguments.overrides)
    check_sweep(overrides, arguments.config_dir)
    fixed = [item.key_or_group for item in overrides if not item.is_sweep_override()]
    named_by = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"  # folders named by what varies
    own_configs = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    codes: list[int] = []

    @hydra_main(config_path=str(config_dir()), config_name="train", version_base="1.3")
    def run_one(config: DictConfig) -> None:
        try:
            code = job(completed(config), Path(HydraConfig.get().runtime.output_dir), debug=arguments.debug)
        except Exception:  # a defect or a full disk, say; the other jobs still run
            traceback.print_exc()
            code = 1
        codes.append(code)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's own errors come to us instead of ending the process
    sys.argv = ["mtl train", "-m", *own_configs, *arguments.overrides, named_by]
    run_one()
    failed = sum(code != 0 for code in codes)
    if failed:
        print(f"{failed} of {len(codes)} jobs failed; their errors stand above.", file=sys.stderr)
    return max(codes, default=0)


def check_sweep(overrides: Sequence[Override], own_configs: str | None) -> None:
    """Refuses a key or a choice that does not exist before anything is written or run, one value at a time."""
    values = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [item.input_line or ""]
        for item in overrides
    ]
    first = [options[0] for options in values]
    composed(first, own_configs)
    for position, options in enumerate(values):
        for option in options[1:]:
            composed([*first[:position], option, *first[position + 1 :]], own_configs)


def maker(group: str, node: DictConfig | None, names: Sequence[str]) -> Maker:
    """Makes a group's maker from its ``_target_`` and options.

    Raises:
        UserError: There is no such class, or it has no such option.
    """
    from hydra.utils import instantiate

    if not node or "_target_" not in node:
        raise UserError(f"{group}: must be a class with its options. Take one of the files of conf/{group}.")
    try:
        partial = instantiate(node, _partial_=True, _convert_="all")
    except HydraException as error:
        raise UserError(
            f"{group}._target_={node['_target_']}: {error.__cause__ or error} Name a class as module.Class, with the "
            "module's folder on PYTHONPATH."
        ) from error
    return Maker(group, partial, SUPPLIED[group], names)


if __name__ == "__main__":
    sys.exit(main())
