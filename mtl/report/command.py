"""``mtl report``: compares finished runs in the terminal and on a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl import usage
from mtl.errors import UserError

if TYPE_CHECKING:
    from mtl.report.bad_cases import Case
    from mtl.report.comparison import Comparison
    from mtl.report.runs import FinishedRun, FoundRuns

MAX_ANSWERS = 5  # strategies whose answers stand side by side


def main(argv: Sequence[str]) -> int:
    """Runs ``mtl report`` and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="mtl report", usage=usage.REPORT, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--reference", nargs="+", type=Path, default=[])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--cases", type=int, default=5)
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--judgements", nargs="+", type=Path, default=[])
    parser.add_argument("--key", type=Path)
    parser.add_argument("--debug", action="store_true")
    try:
        arguments, unknown = parser.parse_known_args(list(argv))
        if unknown:
            raise UserError(f"Unknown option {unknown[0]}. See mtl report --help.")
        run(arguments)
    except (UserError, argparse.ArgumentError) as error:
        if "--debug" in argv:
            raise
        print(f"mtl: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Does what the arguments say."""
    from mtl.report.runs import find_runs

    if arguments.judgements:
        show_judgements(arguments.judgements, arguments.key)
        return
    if not arguments.runs:
        raise UserError("RUNS: name at least one folder of runs or sweeps. See mtl report --help.")
    if arguments.cases < 0:
        raise UserError(f"--cases {arguments.cases}: must not be negative. Give a number, or 0 for none.")
    found = find_runs(arguments.runs)
    output = arguments.output or arguments.runs[0] / "report"
    if arguments.blind:
        ask_judges(found, output)
    else:
        references = find_runs(arguments.reference) if arguments.reference else None
        compare_runs(found, references, output, num_cases=arguments.cases)


def compare_runs(found: FoundRuns, references: FoundRuns | None, output: Path, *, num_cases: int) -> None:
    """Prints the comparison and writes its page."""
    from mtl.report.compare import compare
    from mtl.report.page import write_report
    from mtl.report.terminal import print_comparison
    from mtl.report.words import sentences
    from mtl.reporting.console import standard_console

    comparison = compare(found, references)
    console = standard_console()
    print_comparison(console, comparison)
    alone = references.runs if references else [run for run in found.runs if run.only_task is not None]
    cases = worst_examples(comparison, alone, num_cases) if num_cases else None
    page = write_report(output, comparison, cases, sentences=sentences(comparison))
    console.print(f"\nThe page: {page}", soft_wrap=True)


def worst_examples(comparison: Comparison, references: Sequence[FinishedRun], number: int) -> list[Case]:
    """The worst examples of the tasks that charts show, with the answers of the best strategies and the reference."""
    from mtl.report.bad_cases import worst_cases
    from mtl.report.drawing import shown_tasks
    from mtl.report.evidence import LOSS

    leading = {verdict.best for verdict in comparison.verdicts}
    ranked = sorted(comparison.strategies, key=lambda item: (item.name not in leading, -item.mean.value))
    compared = {item.name: item.runs for item in ranked[:MAX_ANSWERS]}
    cases = []
    for task in shown_tasks(comparison):
        if comparison.metrics[task] == LOSS:
            continue
        runs: Mapping[str, Sequence[FinishedRun]] = compared
        own = [run for run in references if task in run.results.tasks]
        if own and comparison.reference_name is not None:
            runs = {**compared, comparison.reference_name: own}
        cases += worst_cases(task, {name: [run.predictions(task) for run in of] for name, of in runs.items()}, number)
    return cases


def ask_judges(found: FoundRuns, output: Path) -> None:
    """Writes the page for a blind comparison of two runs.

    Raises:
        UserError: There are not two, or they have no task in common.
    """
    from mtl.report.blind import KEY_NAME, write_blind_page
    from mtl.report.evidence import LOSS, gather_evidence
    from mtl.reporting.console import standard_console

    if len(found.runs) != 2:
        raise UserError(f"--blind: needs two runs, and there are {len(found.runs)}. Name the folders of two runs.")
    first, second = found.runs
    tasks = [name for name in first.results.tasks if name in second.results.tasks]
    scored = [task.name for task in gather_evidence(found.runs, tasks) if task.metric != LOSS]  # of the same examples
    if not scored:
        raise UserError(f"--blind: {first.folder} and {second.folder} have no task with answers in common.")
    same = first.strategy == second.strategy
    names = [f"{run.strategy},seed={run.seed}" if same else run.strategy for run in (first, second)]
    page = output / "blind.html"
    answers = {task: (first.predictions(task), second.predictions(task)) for task in scored}
    try:
        output.mkdir(parents=True, exist_ok=True)
        key = write_blind_page(page, (names[0], names[1]), answers)
    except OSError as error:
        raise UserError(
            f"{output}: must be a folder that can be written, found: {error.strerror}. Name another with --output."
        ) from error
    console = standard_console()
    console.print(f"{len(key.items)} pairs of answers to judge; {key.num_identical} are alike and left out.")
    console.print(f"For the judges: {page}", soft_wrap=True)
    console.print(f"Not for them:   {page.with_name(KEY_NAME)}", soft_wrap=True)


def show_judgements(files: Sequence[Path], key: Path | None) -> None:
    """Prints what judges have saved."""
    from mtl.report.judgements import print_judgements, read_judgements
    from mtl.reporting.console import standard_console

    if key is None:
        raise UserError("--judgements: needs --key, the blind_key.json that was written beside the page.")
    print_judgements(standard_console(), read_judgements(files, key))
