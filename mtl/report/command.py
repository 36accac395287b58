"""``mtl report``: compares finished runs in the terminal and on a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl import usage
from mtl.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Runs ``mtl report`` and returns the exit code."""
    parser = argparse.ArgumentParser(prog="mtl report", usage=usage.REPORT, add_help=False, exit_on_error=False)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--reference", nargs="+", type=Path, default=[])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cases", type=int, default=5)
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--judgements", nargs="+", type=Path, default=[])
    parser.add_argument("--key", type=Path)
    parser.add_argument("--debug", action="store_true")
    debug = "--debug" in argv
    try:
        arguments, unknown = parser.parse_known_args(list(argv))
        if unknown:
            raise UserError(f"Unknown option {unknown[0]}. See mtl report --help.")
        report(arguments)
    except (UserError, argparse.ArgumentError) as error:
        if debug:
            raise
        print(f"mtl: error: {error}", file=sys.stderr)
        return 2
    return 0


def report(arguments: argparse.Namespace) -> None:
    """Does what the arguments say."""
    from mtl.report.compare import compare
    from mtl.report.runs import find_runs
    from mtl.report.terminal import print_comparison
    from mtl.reporting.console import standard_console

    if not arguments.runs:
        raise UserError("RUNS: name at least one folder of runs or sweeps. See mtl report --help.")
    found = find_runs(arguments.runs)
    references = find_runs(arguments.reference) if arguments.reference else None
    comparison = compare(found, references)
    print_comparison(standard_console(), comparison)
