"""``mtl strategies``: every option of every lever, with the parameters and defaults of its class."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtl import usage
from mtl.composition import config_dir
from mtl.construct import did_you_mean
from mtl.schema import SUPPLIED

LEVERS = ("sampler", "weighter", "surgery", "adapters")


@dataclass(frozen=True)
class Option:
    """One choice of a lever.

    Args:
        lever: Such as ``sampler``.
        name: As in ``sampler=temperature``.
        summary: What it does and when it helps: the first line of its option file.
        kind: The class.
        defaults: Of its parameters, where the option file and the class give one.
    """

    lever: str
    name: str
    summary: str
    kind: type[Any]
    defaults: dict[str, object]


def main(argv: Sequence[str]) -> int:
    """Prints the options that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="mtl strategies", usage=usage.STRATEGIES, add_help=False)
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args(argv).names
    options = [option for lever in LEVERS for option in options_of(lever)]
    known = [*LEVERS, *(f"{option.lever}={option.name}" for option in options)]
    for name in asked:
        if name not in known:
            print(
                f"mtl: error: {name}: there is no such lever or option.{did_you_mean(name, known)} See mtl strategies.",
                file=sys.stderr,
            )
            return 2
    if not asked:
        print("\n\n".join(overview(lever, options) for lever in LEVERS))
        print("\nmtl strategies <lever>=<option>: what the parameters mean, and the formula, such as surgery=cagrad")
        return 0
    chosen = [option for option in options if {option.lever, f"{option.lever}={option.name}"} & set(asked)]
    print("\n\n".join(described(option, whole=len(chosen) == 1) for option in chosen))
    return 0


def options_of(lever: str) -> list[Option]:
    """A lever's options, by name."""
    return [option_in(file, lever) for file in sorted((config_dir() / lever).glob("*.yaml"))]


def option_in(file: Path, lever: str) -> Option:
    """What an option file offers."""
    text = file.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    module, _, name = content["_target_"].rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(kind).parameters
    defaults = {key: content.get(key) for key in parameters if key not in SUPPLIED[lever]}
    return Option(lever, file.stem, text.splitlines()[0].lstrip("# "), kind, defaults)


def overview(lever: str, options: Sequence[Option]) -> str:
    """A line for each option of a lever, and one for its parameters and their defaults."""
    own = [option for option in options if option.lever == lever]
    width = max(len(option.name) for option in own)
    lines = [lever]
    for option in own:
        lines.append(f"  {option.name:{width}}  {option.summary}")
        if option.defaults:
            defaults = ", ".join(f"{key}={written(value)}" for key, value in option.defaults.items())
            lines.append(f"  {'':{width}}  {defaults}")
    return "\n".join(lines)


def described(option: Option, *, whole: bool) -> str:
    """An option's parameters and, if asked for, all that its class says of itself."""
    lines = [f"{option.lever}={option.name}", f"  {option.summary}"]
    lines += [f"  {option.lever}.{key}={written(value)}" for key, value in option.defaults.items()]
    if whole:
        lines += ["", *(f"  {line}".rstrip() for line in (inspect.getdoc(option.kind) or "").splitlines())]
    return "\n".join(lines)


def written(value: object) -> str:
    """A default as one would write it in an override."""
    if isinstance(value, dict) and "_target_" in value:
        return f"<{value['_target_']}>"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")
