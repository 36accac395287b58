"""Mistakes in a config, as OmegaConf and the YAML reader report them, in one line each."""

from __future__ import annotations

import re

from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import MarkedYAMLError

from mtl.construct import did_you_mean

TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def explained(error: BaseException, place: str = "") -> str | None:
    """The message of an error of OmegaConf or YAML as place, rule, value found and remedy; of others none."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    match error:
        case ConfigKeyError(key="strategy" | "experiment") | ConfigAttributeError(key="strategy" | "experiment"):
            return f"{place}sets keys of its own folder only. Put '# @package _global_' in its first line."
        case ConfigKeyError() | ConfigAttributeError():
            known = [key for key in error.parent_node or () if key != "hydra"]
            nearest = did_you_mean(str(error.key), known)
            return f"{place}{error.full_key}: there is no such option.{nearest} All of them: mtl train --cfg."
        case ValidationError() if kind := re.search(r"could not be converted to (\w+)", first_line):
            rule = TYPE_NAMES.get(kind[1], kind[1])
            return f"{place}{error.full_key}={error.value}: must be {rule}. Correct the value."
        case ValidationError() if "not Optional" in first_line:
            return f"{place}{error.full_key}=null: must have a value. Leave it out for the default."
        case MissingMandatoryValue():
            return f"{place}{error.full_key}: must be given. Set {error.full_key}=<value>, or several below it."
        case OmegaConfBaseException():
            return f"{place}{error.full_key}: {first_line}. Correct the value."
        case MarkedYAMLError(problem_mark=mark) if mark:
            return f"{mark.name}:{mark.line + 1}: {error.problem}. Correct the file."
    return None
