"""SIGTERM and SIGINT: a run ends at the boundary of a step, with a checkpoint, instead of in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Ctrl-C reaches every process of a terminal, and a launcher passes it on once more: within a second it is one signal.
SAME_SIGNAL_SECONDS = 1.0


class StopSignal:
    """Notes that the run was asked to stop.

    ``received`` is the number of the first signal, 0 before. A further one ends the process at once, as if nothing
    listened.
    """

    def __init__(self) -> None:
        self.received = 0
        self._first = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the place of the process's handlers until the block ends; outside of the main thread it can't."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = number, now
        elif now - self._first > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
