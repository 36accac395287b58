"""From overrides to a config, and from a config to settings. Beside the sweep, the only file that knows Hydra."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl import mistakes
from mtl.construct import Maker, build, did_you_mean
from mtl.errors import UserError
from mtl.launch import Launch
from mtl.overrides import escape, unescape
from mtl.schema import SUPPLIED, schema

if TYPE_CHECKING:
    from mtl.settings import Settings

MAX_JOB_NAME = 200  # bytes; file systems have room for 255
OTHER_CHOICES = {
    "tasks": " For your own data: tasks=none tasks.mine.path=...",
    "hydra/launcher": " For Slurm: pip install 'mtl-sft[slurm]'; for jobs side by side: 'mtl-sft[joblib]'.",
    "hydra/sweeper": " For a search: pip install 'mtl-sft[optuna]'.",
}


def job_name(varied: str) -> str:
    """What a job of a sweep is called, and its folder: ``pcgrad,seed=1`` for ``seed=1,strategy=pcgrad``.

    The slashes of paths become underscores. Of a name that is too long for a folder the start and the seed are kept,
    with a hash of the whole.
    """
    name = varied.replace("/", "_")
    strategy = re.search(r"(^|,)strategy=([\w.-]+)", name)
    if strategy:
        rest = f"{name[: strategy.start()]}{name[strategy.end() :]}".strip(",")
        name = f"{strategy[2]},{rest}" if rest else strategy[2]
    if len(name.encode()) <= MAX_JOB_NAME:
        return name
    seed = re.search(r",seed=\d+|^seed=\d+,", name)
    seedless = name.replace(seed[0], "", 1) if seed else name
    digest = hashlib.sha256(seedless.encode()).hexdigest()[:8]
    start = seedless.encode()[: MAX_JOB_NAME - 40].decode(errors="ignore")
    return ",".join([f"{start}~{digest}", *([seed[0].strip(",")] if seed else [])])


def config_dir() -> Path:
    """Where the configs are: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


OmegaConf.register_new_resolver("job_name", job_name)


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
    config = composed_with_hydra(overrides, own_configs, run_config)
    for group, basic in (("launcher", "basic"), ("sweeper", "basic")):
        choice = config.hydra.runtime.choices[f"hydra/{group}"]
        if alone and choice != basic:
            raise UserError(f"hydra/{group}={choice}: is for the jobs of a sweep, and this is a single run. Add -m.")
    over = None if run_config else OmegaConf.select(config, "sweep.over")
    if alone and over:
        varied = ", ".join(over)
        raise UserError(f"sweep.over: would vary {varied} over the jobs of a sweep, and this is a single run. Add -m.")
    return completed(config)


def composed_with_hydra(
    overrides: Sequence[str], own_configs: str | None = None, run_config: str | None = None
) -> DictConfig:
    """The same with Hydra's own node, and before :func:`completed`."""
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
            return compose("run" if run_config else "train", overrides=all_overrides, return_hydra_config=True)
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


def completed(config: DictConfig) -> DictConfig:
    """A composed config with escaped characters put back and every key of the schema in place."""
    plain: Any = OmegaConf.to_container(config)
    plain.pop("hydra", None)
    answer = OmegaConf.merge(schema(), unescape(plain))
    assert isinstance(answer, DictConfig)
    return answer


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
    for stage, values in (config.stages or {}).items():
        for group in ("sampler", "weighter", "surgery"):
            if OmegaConf.is_dict(values) and values.get(group) is not None:
                place = f"stages.{stage}.{group}"
                makers[place] = maker(group, values[group], names, place)
    return settings_from(plain, makers, folder)


def in_parts(node: Any) -> Any:  # noqa: ANN401
    """A node whose objects, and those within them, are left to be made when the run knows what it gives them."""
    if OmegaConf.is_dict(node):
        parts = {key: in_parts(value) for key, value in node.items()}
        return parts | {"_partial_": True} if "_target_" in parts else parts
    return [in_parts(value) for value in node] if OmegaConf.is_list(node) else node


def maker(group: str, node: DictConfig | None, names: Sequence[str], place: str | None = None) -> Maker:
    """Makes a group's maker from its ``_target_`` and options, which stand at ``place`` in the config.

    Raises:
        UserError: There is no such class, or it has no such option.
    """
    from hydra.utils import instantiate

    place = place or group
    if not OmegaConf.is_dict(node) or not node or "_target_" not in node:
        chosen = f"+{group}@{place}=<choice>" if place != group else f"{group}=<choice>"
        raise UserError(f"{place}: must be a class with its options. Take one of the files of conf/{group}: {chosen}.")
    try:
        partial = instantiate(in_parts(node), _convert_="all")
    except HydraException as error:
        raise UserError(
            f"{place}._target_={node['_target_']}: {error.__cause__ or error} Name a class as module.Class, with the "
            "module's folder on PYTHONPATH."
        ) from error
    return Maker(place, partial, SUPPLIED[group], names)


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
