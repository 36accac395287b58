"""What a process does as one of several: who speaks, and how it ends when it or another fails.

A rank that fails leaves word in the error file of torch elastic, the agent that started it. Under a launcher of ours it
says nothing else, since the launcher reads that and speaks for all.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

from mtl.errors import RankError

LAUNCHER = "MTL_LAUNCHER"  # in the environment of a rank: the process of ours that launched it
LOST = "lost_connection"  # in an error file: whether the failure is of a collective whose peer was gone
STAND_BY_SECONDS = 10  # that a rank whose peer is gone leaves to the agent, which looks every 0.1


def is_rank() -> bool:
    """Whether a launcher has started this process, ours or accelerate launch."""
    return "WORLD_SIZE" in os.environ


def is_main() -> bool:
    """Whether this process is rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def report(error: Exception, line: str, *, debug: bool) -> None:
    """Prints a mistake as one line, once for all processes: they all have it, unless it is a ``RankError``."""
    speaks = is_main() or isinstance(error, RankError)
    if is_rank() and isinstance(error, RankError):
        line = f"rank {os.environ.get('RANK', '0')}: {line}"
    leave_word(line)
    if debug and speaks:
        traceback.print_exception(error)
    if LAUNCHER in os.environ:
        return
    if speaks:
        print(f"mtl: error: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(STAND_BY_SECONDS)  # the agent would stop rank 0 as soon as this one ends, maybe before it has spoken


def fail(error: Exception) -> None:
    """Reports an error that is no mistake of the user's.

    A rank whose peer is gone is not the cause of the trouble. It keeps quiet, for the agent to find the cause and to
    stop this rank, and speaks up only if none does.
    """
    from mtl.distributed import lost_connection  # needs torch, which takes its time

    message, details = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
    lost = lost_connection(error)
    if lost:
        leave_word(message, "Lost the connection to another rank.", lost=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(STAND_BY_SECONDS)
    leave_word(message, details, lost=lost)
    if LAUNCHER not in os.environ:
        print(details, file=sys.stderr, flush=True)


def leave_word(message: str, details: str = "", *, lost: bool = False) -> None:
    """Writes why this rank ends to the agent's error file; does nothing in a process that has no agent."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # torch elastic takes the first failure for the cause, and the connection may go before its rank has written.
        moment = int(time.time()) + (STAND_BY_SECONDS if lost else 0)
        extra = {"py_callstack": details or message, "timestamp": str(moment), LOST: lost}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


def end_with_launcher() -> None:
    """Ends this rank, from now on, when the process that launched it is gone: killed, it could not stop its ranks."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1)
        os._exit(1)  # an exception would end this thread only

    threading.Thread(target=watch, daemon=True).start()
