from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from mtl.reporting.results import Cost, Results, TaskResult
from mtl.reporting.summary import print_summary


def task(metric: str | None, before: float, after: float, losses: tuple[float, float] = (2.5, 1.25)) -> TaskResult:
    base = {"loss": losses[0]} | ({metric: before} if metric else {})
    test = {"loss": losses[1], "num_examples": 50} | ({metric: after} if metric else {})
    return TaskResult(metric, base, test, test, 123_456, 12.345, 1)


TASKS = {
    "sentiment": task("accuracy", 0.5, 0.625),
    "translate_en_fr": task("chrf", 0.25, 0.125, (1.0, 1.5)),
    "g2p": task("phoneme_accuracy", 0.3, 0.3),
    "情感分析 😀": task("exact_match", 0.0, 1.0),
    "[red]text": task(None, 0.0, 0.0),
}


def printed(width: int, folder: Path, tasks: dict[str, TaskResult] = TASKS, *, colour: bool = False) -> list[str]:
    output = io.StringIO()
    console = Console(
        file=output,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        force_terminal=colour,
        color_system="standard" if colour else None,
    )
    results = Results({}, 0, "m", tasks, Cost(1, 1, 1, 1.0, 1.0, None))
    print_summary(console, results, {"sentiment": 0.512, "g2p": None}, folder)
    return output.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 200])
def test_numbers_are_whole_and_aligned(width: int, tmp_path: Path) -> None:
    lines = printed(width, tmp_path)
    row = next(line for line in lines if line.startswith("sentiment"))
    assert row.split()[2:] == ["0.512", "0.500", "0.625", "+0.125", "2.500", "1.250", "123,456", "12.35"]
    assert "…" not in "\n".join(lines)
    rows = [line for line in lines[2:10] if "123,456" in line]
    assert len(rows) == len(TASKS)
    assert len({cell_len(line) for line in rows}) == 1
    assert all(cell_len(line) <= width for line in lines[:10])


def test_80_columns_hold_long_names_without_loss(tmp_path: Path) -> None:
    name = "一个非常非常长的任务名称😀" * 3
    lines = printed(80, tmp_path, {name: task("phoneme_accuracy", 0.5, 0.625), **TASKS})
    assert all(cell_len(line) <= 80 for line in lines[:14])
    last = next(number for number, line in enumerate(lines) if line.startswith("sentiment"))
    assert "".join(line.split(" ")[0] for line in lines[2:last]) == name
    assert "+0.125" in lines[2]


def test_a_wide_terminal_keeps_a_task_to_a_line(tmp_path: Path) -> None:
    lines = printed(200, tmp_path)
    assert lines[2 + len(TASKS)].startswith("test data; chance")
    assert "phoneme_accuracy" in lines[4]


def test_improvement_and_decline_have_sign_and_colour(tmp_path: Path) -> None:
    lines = printed(200, tmp_path, colour=True)
    rows = {name: next(line for line in lines if name in line) for name in TASKS}
    green, red = "\x1b[32m", "\x1b[31m"
    assert f"{green}+0.125" in rows["sentiment"].replace(" ", "")
    assert f"{green}1.250" in rows["sentiment"].replace(" ", "")
    assert f"{red}-0.125" in rows["translate_en_fr"].replace(" ", "")
    assert f"{red}1.500" in rows["translate_en_fr"].replace(" ", "")
    assert rows["g2p"].count("\x1b[3") == 1  # its loss alone is coloured
    assert " 0.000" in rows["g2p"]


def test_a_diverged_task_is_shown_as_worse(tmp_path: Path) -> None:
    lines = printed(80, tmp_path, {"a": task("accuracy", 0.5, 0.25, (1.0, math.nan))})
    assert "nan" in lines[2]
    assert "test loss lower on 0 of 1 tasks, score higher on 0 of 1" in lines


def test_verdict(tmp_path: Path) -> None:
    assert "test loss lower on 4 of 5 tasks, score higher on 2 of 4" in printed(80, tmp_path)


def test_of_many_tasks_those_that_gained_least_are_shown(tmp_path: Path) -> None:
    tasks = {f"t{number}": task("accuracy", 0.5, 0.625, (2.0, number / 512)) for number in range(1_024)}
    lines = printed(100, tmp_path, tasks | {"broken": task(None, 0.0, 0.0, (2.0, math.nan))})
    rows = [line.split()[0] for line in lines if "123,456" in line]
    assert rows == ["broken", *(f"t{number}" for number in range(1_023, 992, -1))]
    assert "the 32 of 1,025 tasks with the highest loss after / before; results.json has all" in lines
    assert "test loss lower on 1024 of 1025 tasks, score higher on 1024 of 1024" in lines
    assert not any("highest" in line for line in printed(100, tmp_path, dict(list(tasks.items())[:32])))


def test_where_to_look_next(tmp_path: Path) -> None:
    folder = tmp_path / "情感 run"
    (folder / "adapters" / "g2p").mkdir(parents=True)
    text = "\n".join(printed(80, folder))
    assert f"results     {folder}/results.json" in text
    assert f"tensorboard --logdir '{folder}/tensorboard'" in text
    assert f"PeftModel.from_pretrained(base_model, '{folder}/adapters/g2p')" in text
    (folder / "adapters" / "g2p").rmdir()
    (folder / "model").mkdir()
    text = "\n".join(printed(80, folder))
    assert f"AutoModelForCausalLM.from_pretrained('{folder}/model')" in text
    assert "PeftModel" not in text
