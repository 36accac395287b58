"""The process of one variant: ``python -m benchmarks.worker JSON`` answers each line with the number of a round."""

from __future__ import annotations

import json
import os
import sys

from benchmarks.measuring import InProcess, Setup, Spec


def main() -> None:
    """Prepares the variant, then measures a step for every line of standard input, until that ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    work = json.loads(sys.argv[1])
    setup = Setup(**work["setup"])
    runner = InProcess(Spec(**work["spec"]), setup)
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(runner.step(int(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
