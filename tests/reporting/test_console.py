from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator

from rich.console import Console

from mtl.reporting.console import RunConsole, shortened


def plain(clock: Iterator[float] | None = None) -> tuple[RunConsole, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, width=80, markup=False, emoji=False, highlight=False)
    return (RunConsole(console) if clock is None else RunConsole(console, lambda: next(clock))), output


def live() -> tuple[RunConsole, io.StringIO]:
    output = io.StringIO()
    options = {"force_terminal": True, "force_interactive": True, "legacy_windows": False}
    return RunConsole(Console(file=output, width=100, markup=False, emoji=False, highlight=False, **options)), output


def record(num_tasks: int = 2) -> dict[str, object]:
    tasks = {f"t{number}": {"accuracy": 0.5, "macro_f1": 0.1, "loss": 1.0} for number in range(num_tasks)}
    return {"step": 12, "stage": "joint", "eval": tasks | {"[text]": {"loss": 2.0}}, "mean": {"loss_ratio": 0.871}}


def test_a_log_file_gets_one_line_in_30_seconds_and_nothing_else() -> None:
    now = [0.0]
    output = io.StringIO()
    console = RunConsole(Console(file=output, width=80, markup=False, highlight=False), lambda: now[0])
    with console.stage("joint", done=10, total=60):
        for _ in range(50):
            now[0] += 1.0
            console.step(2.3149, 210.4)
        with console.work("evaluating") as report:
            report("a", 1, 2)
    assert output.getvalue() == (
        "joint: step 11/60  loss 2.31  210 tokens/s\njoint: step 41/60  loss 2.31  210 tokens/s\n"
    )


def test_evaluation_line() -> None:
    console, output = plain()
    console.evaluation(record())
    assert output.getvalue() == (
        "joint: evaluation at step 12  loss/base 0.871  t0 0.500  t1 0.500  [text] loss 2.000\n"
    )


def test_evaluation_line_of_many_tasks_is_cut() -> None:
    console, output = plain()
    console.evaluation(record(num_tasks=100))
    assert output.getvalue().endswith("t11 0.500  and 89 more\n")


def test_evaluation_line_of_many_tasks_names_the_worst() -> None:
    console, output = plain()
    console.evaluation(record(num_tasks=100) | {"worst": {"t9": 1.5, "[b]": 1.25}})
    assert output.getvalue().endswith("loss/base 0.871  worst loss/base:  t9 1.500  [b] 1.250\n")


def test_shortened() -> None:
    assert shortened(["a"] * 12) == ["a"] * 12
    assert shortened(["a"] * 1_024) == ["a"] * 12 + ["and 1,012 more"]


def test_a_warning_comes_once() -> None:
    console, output = plain()
    for _ in range(2):
        console.warn_once("a", "task '[b]情感': look :smile:")
    console.warn_once("b", "other")
    assert output.getvalue() == "warning: task '[b]情感': look :smile:\nwarning: other\n"


def test_a_terminal_gets_a_bar() -> None:
    console, output = live()
    for name in ("joint [red]", "weak"):  # the bar comes back for the second stage
        with console.stage(name, done=1, total=5):
            console.step(2.3149, 1210.4)
            with console.work("evaluating") as report:
                report("情感 [b]", 1, 7)
                console.evaluation(record())
                console._progress.refresh()  # or the test would have to wait for the bar's own clock
    shown = output.getvalue()
    for part in (
        "joint [red]",
        "weak",
        "2/5",
        "loss 2.31  1,210 tokens/s",
        "evaluating 情感 [b]",
        "1/7",
        "[text] loss",
    ):
        assert part in shown
    assert "step 2/5" not in shown


def test_the_terminal_is_whole_again_after_an_error() -> None:
    console, output = live()
    try:
        with console.stage("joint", done=0, total=5):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert output.getvalue().rindex(shown) > output.getvalue().rindex(hidden)


def test_a_name_that_standard_output_cannot_show_does_not_end_the_run() -> None:
    code = "from mtl.reporting.console import RunConsole; RunConsole().warn_once('k', '情 😀')"
    environment = {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == b"warning: \\u60c5 \\U0001f600\n"
