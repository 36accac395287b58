"""``mtl merge``: puts branches of one training together."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl import ranks, usage
from mtl.errors import Stopped, UserError
from mtl.evaluation.objectives import OBJECTIVES


def main(argv: Sequence[str]) -> int:
    """Runs ``mtl merge`` and returns the exit code: 0, 2 for a user's mistake, 128 + a signal."""
    parser = argparse.ArgumentParser(
        prog="mtl merge", usage=usage.MERGE, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("runs", nargs="*", type=Path)
    for name in ("--output", "--start", "--reference"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--select")
    parser.add_argument("--max-evaluations", type=int)
    parser.add_argument("--debug", action="store_true")
    debug = "--debug" in argv
    try:
        arguments, unknown = parser.parse_known_intermixed_args(list(argv))
        if unknown:
            raise UserError(f"Unknown option {unknown[0]}. See mtl merge --help.")
        run(arguments)
    except argparse.ArgumentError as error:
        return mistaken(UserError(f"{error}. See mtl merge --help."), debug=debug)
    except Stopped as stopped:
        print("Stopped; nothing was written. The same command begins again.", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UserError as error:
        return mistaken(error, debug=debug)
    return 0


def mistaken(error: UserError, *, debug: bool) -> int:
    """Reports a user's mistake."""
    if debug:
        raise error
    print(f"mtl: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def run(arguments: argparse.Namespace) -> None:
    """Does what the arguments say."""
    if not arguments.runs:
        raise UserError("RUNS: name the folders of at least two runs. See mtl merge --help.")
    if arguments.output is None:
        raise UserError("--output: name the folder for the merged run.")
    if arguments.select is not None and arguments.select not in OBJECTIVES:
        raise UserError(f"--select={arguments.select}: must be one of {', '.join(OBJECTIVES)}.")
    if ranks.is_rank():
        raise UserError("mtl merge runs in one process. Start it without a launcher.")

    from omegaconf.errors import OmegaConfBaseException

    from mtl.composition import explained
    from mtl.distributed import forget_accelerator
    from mtl.merging.merge import Request, merge

    try:
        merge(
            Request(
                runs=arguments.runs,
                output=arguments.output,
                start=arguments.start,
                select=arguments.select,
                reference=arguments.reference,
                max_evaluations=arguments.max_evaluations,
            )
        )
    except OmegaConfBaseException as error:
        raise UserError(explained(error)) from error
    finally:
        forget_accelerator()
