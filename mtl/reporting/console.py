"""What a person sees while a run goes on."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 30.0
MAX_TASKS = 12  # in a line; the rest is in metrics.jsonl


def standard_console() -> Console:
    """Standard output as a console that shows names as they are: no markup in brackets, no codes for emoji."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal can't show must not end a run
    return Console(markup=False, emoji=False, highlight=False)


def shortened(items: Sequence[str]) -> list[str]:
    """At most 12 items, and how many more there are."""
    more = len(items) - MAX_TASKS
    return [*items[:MAX_TASKS], f"and {more:,} more"] if more > 0 else list(items)


class RunConsole:
    """The progress of a run: bars on a terminal; elsewhere, as in a log file, a plain line every 30 s.

    Args:
        console: Where to print; standard output by default.
        clock: Seconds from anywhere, for the lines.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or standard_console()
        self._clock = clock
        self._last_line = -math.inf
        self._told: set[str] = set()
        self._stage: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
            speed_estimate_period=300,
            transient=True,
            disable=not self.console.is_interactive,
        )

    @contextmanager
    def stage(self, name: str, *, done: int, total: int) -> Iterator[None]:
        """Shows the steps of one stage, ``done`` of which came before (in an earlier process)."""
        with self._bar(name, done, total) as self._stage:
            try:
                yield
            finally:
                self._stage = None

    def step(self, loss: float, tokens_per_second: float) -> None:
        """One more step of the stage is done. ``loss`` is a mean over the step [nats per target token]."""
        assert self._stage is not None, "a step outside of a stage"
        numbers = f"loss {loss:.3g}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._stage, advance=1, numbers=numbers)
        if not self.console.is_interactive and self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            bar = self._progress.tasks[self._progress.task_ids.index(self._stage)]
            self._last_line = self._clock()
            self._print(f"{bar.description}: step {bar.completed:.0f}/{bar.total:.0f}  {numbers}")

    @contextmanager
    def work(self, label: str) -> Iterator[Callable[[str, int, int], None]]:
        """A bar for other work, such as an evaluation: call what it gives with ``(item, done, total)``."""
        with self._bar(label, 0, None) as bar:

            def report(item: str, done: int, total: int) -> None:
                self._progress.update(bar, description=f"{label} {item}", completed=done, total=total)

            yield report

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One line for an ``evaluation_record``: the means, then each task's metric, or its loss if it has none.

        Of many tasks the worst are shown, by loss / loss before training.
        """
        means = {"loss/base": record["mean"].get("loss_ratio"), "mean score": record["mean"].get("score")}
        parts = [f"{name} {value:.3f}" for name, value in means.items() if value is not None]
        if record.get("worst"):
            parts.append("worst loss/base:")
            parts += [f"{name} {ratio:.3f}" for name, ratio in record["worst"].items()]
        else:
            parts += shortened([_metric_of_task(name, values) for name, values in record["eval"].items()])
        self._print(f"{record['stage']}: evaluation at step {record['step']}  {'  '.join(parts)}")

    def warn_once(self, key: str, message: str) -> None:
        """Prints a warning, and nothing when the same ``key`` comes again."""
        if key not in self._told:
            self._told.add(key)
            self._print(f"warning: {message}", style="yellow")

    @contextmanager
    def _bar(self, label: str, done: int, total: int | None) -> Iterator[TaskID]:
        bar = self._progress.add_task(label, completed=done, total=total, numbers="")
        self._progress.start()
        try:
            yield bar
        finally:
            self._progress.remove_task(bar)
            if not self._progress.tasks:
                self._progress.stop()

    def _print(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style), soft_wrap=True)  # a style given to print would colour the bars too


def _metric_of_task(name: str, values: Mapping[str, float]) -> str:
    metric, value = next(iter(values.items()))
    return f"{name} {'loss ' if metric == 'loss' else ''}{value:.3f}"
