"""The command ``mtl train``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mtl import ranks, usage
from mtl.composition import composed, parsable, settings_of
from mtl.errors import UserError
from mtl.launch import new_folder
from mtl.start import report, run
from mtl.sweep import sweep


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
        report(UserError(f"{error}. See mtl train --help."), debug=debug)
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        report(error, debug=debug)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if not ranks.is_rank():
            raise
        ranks.fail(error)
        return 1
    return 2


def run_or_sweep(arguments: argparse.Namespace) -> int:
    """Does what the arguments say."""
    overrides = [parsable(override) for override in arguments.overrides]
    if arguments.config_dir and not Path(arguments.config_dir).is_dir():
        raise UserError(
            f"--config-dir={arguments.config_dir}: must be a folder. Give the folder that holds your configs."
        )
    if arguments.multirun:
        if arguments.config:
            raise UserError(
                "-m and --config: a sweep starts from conf/train.yaml. Give what differs from it as overrides."
            )
        return sweep(overrides, arguments.config_dir, debug=arguments.debug)
    config = composed(overrides, arguments.config_dir, arguments.config, alone=not arguments.cfg)
    if arguments.cfg:
        print(OmegaConf.to_yaml(config), end="")
        return 0
    if config.merged_from:
        raise UserError(
            f"merged_from={','.join(config.merged_from)}: this is the config of mtl merge, which no training repeats. "
            "Train on with resume_from=<its folder> and the config of one of the runs."
        )
    folder = Path("outputs") / datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
    with nullcontext(folder) if config.output_dir else new_folder(folder) as own_folder:
        return run(settings_of(config, own_folder), config.output_dir, debug=arguments.debug).code


if __name__ == "__main__":
    sys.exit(main())
