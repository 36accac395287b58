"""The page and the CSV files: every number where it belongs, every text as text."""

from __future__ import annotations

import base64
import csv
import hashlib
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mtl.errors import UserError
from mtl.report.bad_cases import worst_cases
from mtl.report.compare import compare
from mtl.report.page import write_report
from mtl.report.runs import find_runs
from mtl.report.words import sentences

CHANGES = {
    "pcgrad": {"sentiment": 0.2, "情感 😀": -0.02},
    "equal": {"sentiment": 0.1, "情感 😀": 0.0},
    "rlw": {"sentiment": -0.1, "情感 😀": -0.2},
}
EVIL = "<script>alert('1')</script>"


class Page(HTMLParser):
    """The tables of a page as rows of cells, its ids, and where it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.ids: list[str] = []
        self.references: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._rows: list[list[str]] | None = None
        self._tag = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._tag = tag
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [value for key, value in attrs if key in ("src", "href", "xlink:href", "action", "srcset")]
        if tag == "table":
            self._rows = self.tables[attributes["id"]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        elif tag == "small" and self._rows:
            self._rows[-1][-1] += " "
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._tag = ""
        if tag == "table":
            self._rows = None

    def handle_data(self, data):
        if self._tag == "script":
            self.scripts[-1] += data
        elif self._tag != "style":
            self.text += data
            if self._rows and self._rows[-1]:
                self._rows[-1][-1] += data.replace("\N{MINUS SIGN}", "-")

    def row(self, table, name):
        return next(
            [cell.strip() for cell in row] for row in self.tables[table] if row[0].split("●")[0].split()[0] == name
        )


@pytest.fixture
def write(tmp_path):
    def write_and_read(comparison, cases=None, **options):
        return Page(write_report(tmp_path / "report", comparison, cases, **options))

    return write_and_read


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_summary(make_comparison, write):
    page = write(make_comparison(CHANGES))
    assert [row[0].strip() for row in page.tables["summary-table"][1:]] == ["pcgrad ●", "equal ●", "rlw"]
    assert page.row("summary-table", "rlw") == [
        "rlw",
        "-15.0 % [-20.0, -10.0]",
        "-20.0 % 情感 😀",
        "2 / 2",
        "1.50",
        "-15.0 · -15.0 · -15.0",
        "+24.0 % [+19.0, +29.0]",
        ".250 3 seeds",
        "0.03",
        "1.2",
        "1.00",
    ]
    assert page.row("summary-table", "pcgrad")[6:8] == ["best", ""]
    assert len({len(row) for row in page.tables["summary-table"]}) == 1


def test_the_tasks(make_comparison, write):
    page = write(make_comparison(CHANGES))
    assert [cell.strip() for cell in page.tables["tasks-table"][0]] == [
        "task",
        "before",
        "single-task",
        "pcgrad",
        "equal",
        "rlw",
    ]
    assert page.row("tasks-table", "sentiment") == [
        *("sentiment accuracy", "0.250", "0.500", "0.600 [0.550, 0.650] +20.0 % · p .020"),
        *("0.550 [0.500, 0.600] +10.0 % · p .020", "0.450 [0.400, 0.500] -10.0 % · p .020"),
    ]
    cells = re.findall(r'<span class="(better|worse|)">(0\.\d+)</span>', page.source)
    assert [kind for kind, _ in cells] == ["better", "better", "worse", "", "", "worse"]


def test_without_reference(make_comparison, write):
    page = write(make_comparison(CHANGES, compared=False))
    assert page.row("summary-table", "rlw")[:3] == ["rlw", "0.425 [0.375, 0.475]", "0.400 情感 😀"]
    assert page.row("tasks-table", "sentiment")[1:] == [
        *("0.250", "0.600 [0.550, 0.650]", "0.550 [0.500, 0.600]", "0.450 [0.400, 0.500]"),
    ]
    assert "hurt" not in page.tables["summary-table"][0]


def test_numbers_that_there_are_not(make_comparison, write):
    comparison = make_comparison({"one": {"a": math.nan, "b": 0.1}, "two": {"a": 0.1, "b": 0.1}}, half_width=math.nan)
    page = write(comparison)
    nothing = "\N{EN DASH}"
    assert page.row("summary-table", "one")[1] == nothing
    assert page.row("summary-table", "two")[1] == "+10.0 %"
    assert page.row("tasks-table", "a")[3].startswith(nothing)
    assert "nan" not in page.text.lower()


def test_one_strategy_one_task_one_seed(make_comparison, write):
    page = write(make_comparison({"pcgrad": {"a": 0.1}}, seeds=(7,)))
    assert "behind the best" not in page.tables["summary-table"][0]
    assert len(page.tables["summary-table"]) == len(page.tables["tasks-table"]) == 2
    assert "1 strategy on 1 task" in page.text
    assert "chart-mean_and_worst" not in page.ids


def test_texts_stay_texts(make_comparison, write, tmp_path):
    changes = {EVIL: {EVIL: 0.1, "a\nb": 0.2}, '=1+1,"x"': {EVIL: 0.0, "a\nb": 0.0}}
    page = write(
        make_comparison(changes, notes=(EVIL + "note",), failures={EVIL + "job": EVIL + "error"}),
        sentences=[EVIL + "verdict", "a lone surrogate: \ud800", "NUL: \0"],
    )
    assert "\0" not in page.source
    assert page.source.count("<script") == page.source.count("</script") == 1
    for ending in ("note", "job", "error", "verdict"):
        assert EVIL + ending in page.text
    assert page.tables["summary-table"][1][0].strip().startswith(EVIL)
    rows = read_csv(tmp_path / "report/tasks.csv")
    assert {(row["strategy"], row["task"]) for row in rows} == {
        (name, task) for name in changes for task in changes[name]
    }


def test_the_page_needs_nothing_else(make_comparison, write, tmp_path):
    page = write(make_comparison(CHANGES))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.source)[1]
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "on" not in {name[:2] for name in re.findall(r"<[^>]* (\w+)=", page.source)} - {"on"}
    local = [reference for reference in page.references if not reference.startswith("#")]
    for reference in local:
        assert (tmp_path / "report" / reference).is_file(), reference
    assert {"summary.csv", "tasks.csv", "charts/tasks.svg", "charts/tasks.png"} <= set(local)
    assert "http" not in page.source.replace("http://www.w3.org", "").replace("http-equiv", "")


def test_ids_are_there_once(make_comparison, write):
    page = write(make_comparison(CHANGES))
    own = [name for name in page.ids if not re.fullmatch(r"[mp][0-9a-f]{10}", name)]  # what charts draw with
    assert len(own) == len(set(own))
    targets = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert targets <= set(page.ids)


def test_csv_files(make_comparison, write, tmp_path):
    comparison = make_comparison(CHANGES)
    write(comparison)
    summary = read_csv(tmp_path / "report/summary.csv")
    assert [row["strategy"] for row in summary] == list(CHANGES)
    for row, item in zip(summary, comparison.strategies, strict=True):
        assert float(row["mean"]) == item.mean.value
        assert float(row["worst_low"]) == item.worst.low
        assert row["worst_task"] == item.worst_task
        assert int(row["num_hurt"]) == item.num_hurt
        assert row["per_seed_mean"].split() == [f"{seed}:{value}" for seed, value in item.per_seed_mean.items()]
        assert float(row["seconds"]) == 75.0
    assert summary[0]["sign_flip_p"] == ""
    assert float(summary[1]["sign_flip_p"]) == 0.25
    rows = read_csv(tmp_path / "report/tasks.csv")
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        outcome = comparison.strategies[list(CHANGES).index(row["strategy"])].tasks[row["task"]]
        assert float(row["score"]) == outcome.per_seed[int(row["seed"])]
        assert float(row["change_high"]) == outcome.change.high
        assert float(row["reference_score"]) == 0.5


def test_nan_is_an_empty_field(make_comparison, write, tmp_path):
    write(make_comparison({"x": {"a": math.nan}}, half_width=math.nan, compared=False))
    assert "nan" not in (tmp_path / "report/summary.csv").read_text()
    row = read_csv(tmp_path / "report/tasks.csv")[0]
    assert row["score"] == row["mean_score_low"] == row["change"] == row["reference_score"] == ""


def test_finished_runs(make_run, write, tmp_path):
    for strategy, skill in (("pcgrad", 0.9), ("equal", 0.5)):
        for seed in range(2):
            make_run(strategy, seed, skill=skill, conflict_every=10)
    (tmp_path / "runs/equal,seed=0/metrics.jsonl").unlink()
    (tmp_path / "runs/equal,seed=1/metrics.jsonl").write_text("[]\n")
    found = find_runs([tmp_path / "runs"])
    comparison = compare(found)
    cases = [
        case
        for task in ("sentiment", "inflect")
        for case in worst_cases(
            task, {item.name: [run.predictions(task) for run in item.runs] for item in comparison.strategies}, 2
        )
    ]
    page = write(comparison, cases, sentences=sentences(comparison))
    assert page.row("summary-table", "pcgrad")[0] == "pcgrad ●"
    charts = ["tasks", "mean_and_worst", "validation_loss", "levers", "conflict", "epochs", "cost"]
    assert [name for name in page.ids if name.startswith("chart-")] == [f"chart-{name}" for name in charts]
    assert len(re.findall(r"left out of the curves: \S*equal,seed=\d/metrics\.jsonl", page.text)) == 2
    assert "<b>what?</b>" in page.text
    assert sentences(comparison)[0] in page.text


def test_cases_may_be_left_out(make_comparison, write):
    assert "cases" not in write(make_comparison(CHANGES)).ids
    assert "cases" in write(make_comparison(CHANGES), []).ids


def test_an_earlier_report_is_replaced(make_comparison, write):
    write(make_comparison(CHANGES))
    assert len(write(make_comparison({"x": {"a": 0.1}, "y": {"a": 0.0}})).tables["summary-table"]) == 3


def test_a_folder_that_is_none(make_comparison, tmp_path):
    (tmp_path / "report").touch()
    with pytest.raises(
        UserError, match=r"report: must be a folder that can be written, found: .* Name another"
    ) as error:
        write_report(tmp_path / "report", make_comparison(CHANGES))
    assert "\n" not in str(error.value)


def test_many_strategies_and_tasks(make_comparison, write):
    changes = {f"strategy {i}": {f"task {j}": 0.5 - i / 100 - j / 1000 for j in range(100)} for i in range(70)}
    page = write(make_comparison(changes))
    assert len(page.tables["summary-table"]) == 71
    assert len(page.tables["tasks-table"]) == 13
    assert {len(row) for row in page.tables["tasks-table"]} == {3 + 12}
    assert "Shown are 12 of 70 strategies and 12 of 100 tasks" in " ".join(page.text.split())
    assert len(page.source) < 1_000_000
