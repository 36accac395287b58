"""``mtl train``: from a config and overrides to settings. The only file that knows Hydra."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
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
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mtl import mistakes, ranks, usage
from mtl.construct import Maker, build, did_you_mean
from mtl.errors import Stopped, UserError
from mtl.launch import JobFailed, Launch, RankFailed, new_folder, run_processes
from mtl.overrides import escape, unescape
from mtl.schema import SUPPLIED, schema

if TYPE_CHECKING:
    from mtl.settings import Settings

OTHER_CHOICES = {
    "tasks": " For your own data: tasks=none tasks.mine.path=...",
    "hydra/launcher": " For Slurm: pip install 'mtl-sft[slurm]'.",
}


def config_dir() -> Path:
    """Where the configs are: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``mtl train`` and returns the exit code: 0, 1 for a failure, 2 for a user's mistake, 128 + a signal."""
    ranks.end_with_launcher()
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
            print(usage.TRAIN, end="")
            return 0
        if unknown:
            raise UserError(f"Unknown option {unknown[0]}. See mtl train --help.")
        return run_or_sweep(arguments)
    except argparse.ArgumentError as error:
        return report(UserError(f"{error}. See mtl train --help."), debug=debug)
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        return report(error, debug=debug)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if not ranks.is_rank():
            raise
        ranks.fail(error)
        return 1


def run_or_sweep(arguments: argparse.Namespace) -> int:
    """Does what the arguments say."""
    arguments.overrides = [parsable(override) for override in arguments.overrides]
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise UserError(
            f"--config-dir={arguments.config_dir}: must be a folder. Give the folder that holds your configs."
        )
    if arguments.multirun:
        return sweep(arguments)
    config = composed(arguments.overrides, arguments.config_dir, arguments.config, alone=not arguments.cfg)
    if arguments.cfg:
        print(OmegaConf.to_yaml(config), end="")
        return 0
    folder = Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    with nullcontext(folder) if config.output_dir else new_folder(folder) as own_folder:
        return job(config, own_folder, debug=arguments.debug)


def parsable(override: str) -> str:
    """The override, escaped if it holds characters that Hydra does not know."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return escape(override)
    return override


def composed(
    overrides: Sequence[str], own_configs: str | None = None, run_config: str | None = None, *, alone: bool = False
) -> DictConfig:
    """The config that the overrides give, over ``conf/train.yaml`` or over the ``config.yaml`` of a run.

    Raises:
        UserError: A choice or a key does not exist, or the config is for a sweep and is used ``alone``.
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
            all_overrides = [*searched, *overrides]
            config = compose("run" if run_config else "train", overrides=all_overrides, return_hydra_config=True)
        except MissingConfigException as error:
            group, _, name = (error.missing_cfg_file or "").rpartition("/")
            choices = GlobalHydra.instance().config_loader().get_group_options(group)
            own = OTHER_CHOICES.get(group, "")
            raise UserError(
                f"{group}={name}: there is no such choice.{did_you_mean(name, choices)} "
                f"There are: {', '.join(choices)}.{own}"
            ) from error
        except ValueError as error:
            if isinstance(error, OmegaConfBaseException):
                raise
            # Hydra's own, where a group is set to something else than a choice
            raise UserError(f"{' '.join(overrides)}: {error}. Correct the overrides; see mtl train --help.") from error
    launcher = config.hydra.runtime.choices["hydra/launcher"]
    if alone and launcher != "basic":
        raise UserError(f"hydra/launcher={launcher}: starts the jobs of a sweep, and this is a single run. Add -m.")
    return completed(config)


def completed(config: DictConfig) -> DictConfig:
    """A composed config with escaped characters put back and every key of the schema in place."""
    plain: Any = OmegaConf.to_container(config)
    plain.pop("hydra", None)
    answer = OmegaConf.merge(schema(), unescape(plain))
    assert isinstance(answer, DictConfig)
    return answer


def job(config: DictConfig, folder: Path, *, debug: bool) -> int:
    """Runs one job; a mistake is reported and becomes the exit code, so that a sweep goes on."""
    try:
        execute(settings_of(config, folder), config.output_dir, debug=debug)
    except Stopped as stopped:
        return stopped.exit_code
    except RankFailed as error:
        report(error, debug=False)
        return 1
    except (UserError, OmegaConfBaseException) as error:
        return report(error, debug=debug)
    return 0


def execute(settings: Settings, output_dir: str | None, *, debug: bool) -> None:
    """Does the job in this process, or in those that ``launch`` asks for; ``output_dir`` is what the config says."""
    import torch  # which takes its time

    from mtl.distributed import forget_accelerator
    from mtl.job import run_job
    from mtl.prepare import config_text

    if not ranks.is_rank():
        launch = build(Launch, "launch", settings.config["launch"]).on(
            torch.cuda.device_count(), use_cpu=settings.options.use_cpu, output_dir=output_dir
        )
        if launch.num_processes != 1:
            config = {**settings.config, "resume_from_checkpoint": settings.resume_from_checkpoint}
            run_processes(launch, config_text(config), settings.output_dir, debug=debug)
            return
    try:
        run_job(settings)
    finally:
        forget_accelerator()


def settings_of(config: DictConfig, folder: Path) -> Settings:
    """The settings that a config means; ``folder`` is for the output where the config names none.

    Raises:
        UserError: A value breaks a rule.
    """
    from mtl.settings import settings_from

    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if build(Launch, "launch", plain["launch"]).cpu:
        plain["use_cpu"] = True
    names = list(plain["tasks"] or {})
    makers = {group: maker(group, config[group], names) for group in SUPPLIED}
    return settings_from(plain, makers, folder)


def report(error: Exception, *, debug: bool) -> int:
    """Prints a mistake as one line, once for all processes; returns the exit code."""
    ranks.report(error, unescape(" ".join(explained(error).split())), debug=debug)
    return 2


def explained(error: Exception) -> str:
    """The message of an error of ours, of Hydra, OmegaConf or YAML, as place, rule, value found and remedy."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: must be of the form key=value. Put a value with commas, colons or brackets in quotes "
            "within quotes: \"key='a, b'\"."
        )
    cause = (error.__cause__ or error.__context__ or error) if isinstance(error, HydraException) else error
    if isinstance(cause, ConfigCompositionException) and "No match in the defaults list" in str(cause):
        group = str(cause).split("'")[1]
        return f"{group}: this config has no such choice to override. Set options: {group}.<option>=<value>."
    file = re.match(r"In '(.+)': \w+ raised while composing", str(error))
    return mistakes.explained(cause, f"{file[1]}.yaml: " if file else "") or str(error)


def sweep(arguments: argparse.Namespace) -> int:
    """Runs every combination of the overrides' values as a job of its own."""
    if ranks.is_rank():
        raise UserError(
            "A sweep can't run inside accelerate launch: each process would sweep on its own and mix up the jobs. Run: "
            f"mtl train -m launch.num_processes={os.environ['WORLD_SIZE']} {' '.join(arguments.overrides)}"
        )
    if arguments.config:
        raise UserError("-m and --config: a sweep starts from conf/train.yaml. Give what differs from it as overrides.")
    overrides = OverridesParser.create().parse_overrides(arguments.overrides)
    check_sweep(overrides, arguments.config_dir)
    fixed = [item.key_or_group for item in overrides if not item.is_sweep_override()]
    named_by = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"  # folders named by what varies
    own_configs = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    # Slurm's launcher asks a job to stop before its time is up; this signal is one that jobs answer by saving.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "TERM")
    sweeper, codes = os.getpid(), list[int]()

    @hydra_main(config_path=str(config_dir()), config_name="train", version_base="1.3")
    def run_one(config: DictConfig) -> None:
        try:
            code = job(completed(config), Path(HydraConfig.get().runtime.output_dir), debug=arguments.debug)
        except Exception:  # a defect or a full disk, say; the other jobs still run
            traceback.print_exc()
            code = 1
        if code and os.getpid() != sweeper:
            raise JobFailed(code, HydraConfig.get().sweep.dir)
        codes.append(code)
        if code > 128:
            raise SystemExit(code)  # stopped by a signal, which is meant for the sweep

    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's own errors come to us instead of ending the process
    sys.argv = ["mtl train", "-m", *own_configs, *arguments.overrides, named_by]
    try:
        run_one()
    except JobFailed as error:
        print(f"mtl: error: {error}", file=sys.stderr)
        return error.code
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


def in_parts(node: Any) -> Any:  # noqa: ANN401
    """A node whose objects, and those within them, are left to be made when the run knows what it gives them."""
    if OmegaConf.is_dict(node):
        parts = {key: in_parts(value) for key, value in node.items()}
        return parts | {"_partial_": True} if "_target_" in parts else parts
    return [in_parts(value) for value in node] if OmegaConf.is_list(node) else node


def maker(group: str, node: DictConfig | None, names: Sequence[str]) -> Maker:
    """Makes a group's maker from its ``_target_`` and options.

    Raises:
        UserError: There is no such class, or it has no such option.
    """
    from hydra.utils import instantiate

    if not node or "_target_" not in node:
        raise UserError(f"{group}: must be a class with its options. Take one of the files of conf/{group}.")
    try:
        partial = instantiate(in_parts(node), _convert_="all")
    except HydraException as error:
        raise UserError(
            f"{group}._target_={node['_target_']}: {error.__cause__ or error} Name a class as module.Class, with the "
            "module's folder on PYTHONPATH."
        ) from error
    return Maker(group, partial, SUPPLIED[group], names)


if __name__ == "__main__":
    sys.exit(main())
