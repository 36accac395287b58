"""The command lines of ``mtl export``, ``eval``, ``predict`` and ``chat``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl import usage
from mtl.errors import UserError

if TYPE_CHECKING:
    from mtl.handover.combining import Combination
    from mtl.handover.deployment import Deployment


def export(argv: Sequence[str]) -> int:
    """Runs ``mtl export`` and returns the exit code."""
    parser = _parser("export", usage.EXPORT)
    parser.add_argument("--task", "--tasks", dest="tasks", action="append", default=[])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--format", default="adapter")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--combine")
    parser.add_argument("--weights")
    parser.add_argument("--density", type=float)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--name")
    return _run(parser, argv, _export)


def evaluate(argv: Sequence[str]) -> int:
    """Runs ``mtl eval`` and returns the exit code."""
    parser = _parser("eval", usage.EVAL)
    parser.add_argument("--task", "--tasks", dest="tasks", action="append", default=[])
    parser.add_argument("--split", default="test")
    parser.add_argument("--max-examples", type=int)
    parser.add_argument("--output", type=Path)
    return _run(parser, argv, _evaluate)


def predict(argv: Sequence[str]) -> int:
    """Runs ``mtl predict`` and returns the exit code."""
    parser = _parser("predict", usage.PREDICT)
    parser.add_argument("--task")
    parser.add_argument("--input", type=Path)
    parser.add_argument("--output", type=Path)
    return _run(parser, argv, _predict)


def chat(argv: Sequence[str]) -> int:
    """Runs ``mtl chat`` and returns the exit code."""
    parser = _parser("chat", usage.CHAT)
    parser.add_argument("--task")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    return _run(parser, argv, _chat)


def _parser(verb: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"mtl {verb}", usage=text, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--debug", action="store_true")
    return parser


def _run(parser: argparse.ArgumentParser, argv: Sequence[str], do: Callable[[Path, argparse.Namespace], None]) -> int:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' progress bars would fill a log file
    debug = "--debug" in argv
    try:
        arguments, unknown = parser.parse_known_intermixed_args(list(argv))
        if unknown:
            raise UserError(f"Unknown option {unknown[0]}. See {parser.prog} --help.")
        if len(arguments.folders) != 1:
            found = " ".join(map(str, arguments.folders)) or "none"
            raise UserError(f"One folder of a run or export must be given, found {found}. See {parser.prog} --help.")
        do(arguments.folders[0], arguments)
    except BrokenPipeError:  # whoever read standard output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, argparse.ArgumentError, OSError) as error:
        if debug:
            raise
        place = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"mtl: error: {' '.join(place.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _export(folder: Path, arguments: argparse.Namespace) -> None:
    from mtl.handover.deployment import open_run
    from mtl.handover.export import Request, export
    from mtl.reporting.console import RunConsole

    tasks = _split(arguments.tasks)
    if arguments.all and tasks:
        raise UserError("--all and --task: not both. Leave one of them out.")
    deployment = open_run(folder)
    needs_choice = len(deployment.tasks) > 1 and any(item.adapter is not None for item in deployment.tasks.values())
    if not (arguments.all or tasks) and needs_choice:
        raise UserError(f"--task or --all: one must be given. The tasks are: {', '.join(deployment.tasks)}.")
    chosen = deployment.named(tasks)
    request = Request(
        kind=arguments.format,
        tasks=chosen if tasks or arguments.combine else [],
        output=arguments.output,
        dtype=arguments.dtype,
        combination=_combination(arguments, len(chosen)),
        name=arguments.name,
    )
    console = RunConsole()
    with console.work("exporting") as progress:
        folders = export(deployment, request, progress)
    for written in folders:
        console.console.print(f"{written}", soft_wrap=True)


def _combination(arguments: argparse.Namespace, num_tasks: int) -> Combination | None:
    from mtl.handover.combining import Combination

    if arguments.combine is None:
        options = ("weights", "density", "rank", "seed", "name")
        idle = next((key for key in options if getattr(arguments, key) is not None), None)
        if idle is not None:
            raise UserError(f"--{idle}: is for --combine only. Add it, or leave --{idle} out.")
        return None
    try:
        weights = [1.0] * num_tasks if arguments.weights is None else [float(w) for w in arguments.weights.split(",")]
    except ValueError:
        raise UserError(f"--weights {arguments.weights}: must be numbers with commas between, one a task.") from None
    density = 0.5 if arguments.density is None else arguments.density
    return Combination(arguments.combine, weights, density, arguments.seed or 0, arguments.rank)


def _evaluate(folder: Path, arguments: argparse.Namespace) -> None:
    from mtl.handover.evaluating import evaluate_tasks, print_scores, write_scores
    from mtl.handover.loading import opened
    from mtl.reporting.console import RunConsole

    if arguments.split not in ("val", "test"):
        raise UserError(f"--split {arguments.split}: must be val or test.")
    if arguments.max_examples is not None and arguments.max_examples < 1:
        raise UserError(f"--max-examples {arguments.max_examples}: must be positive.")
    deployment = _open(folder)
    names = deployment.named(_split(arguments.tasks))
    console = RunConsole()
    with opened(deployment) as loaded, console.work(f"evaluating {arguments.split}") as progress:
        found = evaluate_tasks(loaded, names, arguments.split, arguments.max_examples, progress)
    print_scores(console.console, deployment, arguments.split, found)
    output = arguments.output or folder / f"eval-{arguments.split}.json"
    write_scores(output, deployment, arguments.split, found)
    console.console.print(f"{output}", soft_wrap=True)


def _predict(folder: Path, arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from mtl.handover.loading import opened
    from mtl.handover.predicting import answerable, predict
    from mtl.handover.rows import read_prompts
    from mtl.reporting.console import RunConsole

    if arguments.input is None:
        raise UserError("--input: must be given, a file with a prompt in each row. See mtl predict --help.")
    deployment = _open(folder)
    name = deployment.one(arguments.task)
    rows = read_prompts(arguments.input, deployment.tasks[name].task)
    answerable(deployment.tasks[name], rows)  # before the model is loaded
    console = RunConsole(Console(stderr=True, markup=False, emoji=False, highlight=False))  # answers go to stdout
    with opened(deployment) as loaded, console.work("answering") as progress:
        predict(loaded, name, rows, arguments.output, progress)


def _chat(folder: Path, arguments: argparse.Namespace) -> None:
    from mtl.handover.chatting import COMMANDS, Chat, talk
    from mtl.handover.loading import opened

    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: must be positive.")
    if not arguments.temperature >= 0:
        raise UserError(f"--temperature {arguments.temperature}: must not be negative; 0 takes the likeliest answer.")
    deployment = _open(folder)
    name = deployment.one(arguments.task)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with opened(deployment) as loaded:
        if sys.stdin.isatty():
            say(f"{COMMANDS}.")
        talk(Chat(loaded, name, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, say=say))


def _open(folder: Path) -> Deployment:
    from mtl.handover.deployment import open_deployment

    return open_deployment(folder)


def _split(values: Sequence[str]) -> list[str]:
    """Names that were given one by one, or with commas between."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]
