"""The command ``mtl``: finds the verb and imports no more than it needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mtl import __version__, usage

USAGE = f"""mtl {__version__}: fine-tune one language model on many tasks at once so that every task ends up good

usage: mtl <verb> [arguments]

verbs:
  train        train a run, or with -m a sweep over strategies      mtl train --help
  report       compare finished runs, in the terminal and on a page mtl report --help
  merge        put branches of one training together, by weights    mtl merge --help
               that validation data choose
  export       adapters or merged weights, to use without mtl       mtl export --help
  eval         evaluate what is deployed of a run, or an export     mtl eval --help
  predict      a task's answers to the rows of a file               mtl predict --help
  chat         talk to a task's model                               mtl chat --help
  strategies   the options of every lever, with their parameters    mtl strategies --help

  -h, --help     this text
  --version      the version
"""
HELP = {"-h", "--help"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "--help"
    if verb in HELP:
        print(USAGE, end="")
        return 0
    if verb == "--version":
        print(__version__)
        return 0
    texts = {
        "train": usage.TRAIN,
        "report": usage.REPORT,
        "merge": usage.MERGE,
        "export": usage.EXPORT,
        "eval": usage.EVAL,
        "predict": usage.PREDICT,
        "chat": usage.CHAT,
        "strategies": usage.STRATEGIES,
    }
    if verb not in texts:
        print(f"mtl: error: unknown verb {verb!r}. There are: {', '.join(texts)}. See mtl --help.", file=sys.stderr)
        return 2
    if HELP & set(arguments):
        print(texts[verb], end="")
        return 0
    if verb == "report":
        from mtl.report.command import main as run
    elif verb == "merge":
        from mtl.merging.command import main as run
    elif verb == "export":
        from mtl.handover.command import export as run
    elif verb == "eval":
        from mtl.handover.command import evaluate as run
    elif verb == "predict":
        from mtl.handover.command import predict as run
    elif verb == "chat":
        from mtl.handover.command import chat as run
    elif verb == "strategies":
        from mtl.strategies import main as run
    else:
        from mtl.train import main as run
    return run(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
