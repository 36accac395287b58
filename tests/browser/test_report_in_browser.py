"""The page of a comparison as a reader sees it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from mtl.report.bad_cases import worst_cases
from mtl.report.compare import compare
from mtl.report.page import write_report
from mtl.report.runs import find_runs
from mtl.report.words import sentences

FACTORY = Path(__file__).parents[1] / "report/conftest.py"
spec = importlib.util.spec_from_file_location("made_up_runs", FACTORY)
made_up_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made_up_runs)

TASKS = {
    "sentiment": "accuracy",
    "情感 😀": "accuracy",
    "<b>inflect": "exact_match",
    "a task with quite a long name": "chrf",
    "a_name_without_a_space_" + "x" * 90: "accuracy",
    "notes": None,
}
SKILLS = {"pcgrad": 0.9, "equal": 0.6, "performance+pcgrad with a long name": 0.5, "rlw": 0.1}
CHARTS = [
    *("tasks", "mean_and_worst", "validation_loss", "validation_score"),
    *("levers", "conflict", "epochs", "cost"),
]
CHART_BOXES = """
return Object.fromEntries([...document.querySelectorAll("figure")].map(figure => {
    const {width, height} = figure.querySelector("svg").getBoundingClientRect();
    return [figure.id, [width, height, figure.querySelector(".chart").clientWidth]];
}));
"""
SMALLEST_TEXT = """
return Math.min(...[...document.querySelectorAll("svg text")].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)));
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for strategy, skill in SKILLS.items():
        for seed in range(2):
            made_up_runs.write_run(
                folder / "runs", strategy, seed, tasks=TASKS, skill=skill, conflict_every=5, scored=True
            )
    for task in TASKS:
        made_up_runs.write_run(folder / "runs/alone", f"alone on {len(task)}", tasks=TASKS, only_task=task)
    comparison = compare(find_runs([folder / "runs"]))
    cases = [
        case
        for task, metric in TASKS.items()
        if metric
        for case in worst_cases(
            task, {item.name: [run.predictions(task) for run in item.runs] for item in comparison.strategies}, 3
        )
    ]
    return comparison, write_report(folder, comparison, cases, sentences=sentences(comparison))


@pytest.fixture
def opened(browser, report):
    """The browser with the page open; what it complained of and asked for is looked at after the test."""
    url = report[1].as_uri()
    browser.get(url)
    yield browser
    assert browser.console_errors() == []
    assert set(browser.requested_urls()) == {url}


def column(browser, index):
    rows = browser.find_elements(By.CSS_SELECTOR, "#summary-table tbody tr")
    return [row.find_elements(By.CSS_SELECTOR, "th, td")[index].text.split("\n")[0].removesuffix(" ●") for row in rows]


def test_the_tables(opened, report):
    comparison, _ = report
    assert column(opened, 0) == [item.name for item in comparison.strategies]
    shown = [float(text.replace("\N{MINUS SIGN}", "-").removesuffix(" %")) for text in column(opened, 1)]
    assert shown == pytest.approx([100 * item.mean.value for item in comparison.strategies], abs=0.05)
    tasks = opened.find_elements(By.CSS_SELECTOR, "#tasks-table tbody th bdi")
    assert [element.text for element in tasks] == list(TASKS)
    verdict = opened.find_elements(By.CSS_SELECTOR, ".verdict li")
    assert [element.text for element in verdict] == sentences(comparison)


def test_sorting(opened, report):
    comparison, _ = report
    heads = opened.find_elements(By.CSS_SELECTOR, "#summary-table thead button")
    by_name = sorted(item.name for item in comparison.strategies)
    heads[0].click()
    assert column(opened, 0) == by_name
    heads[0].click()
    assert column(opened, 0) == by_name[::-1]
    heads[2].click()  # worst task: the highest first
    by_worst = sorted(comparison.strategies, key=lambda item: -item.worst.value)
    assert column(opened, 0) == [item.name for item in by_worst]
    assert opened.find_element(By.CSS_SELECTOR, "[aria-sort]").get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits(opened, width):
    opened.set_viewport(width, 900)
    for element in opened.find_elements(By.CSS_SELECTOR, "details"):
        opened.execute_script("arguments[0].open = true", element)
    assert opened.execute_script("return innerWidth") == width
    page_width = opened.execute_script("return document.documentElement.scrollWidth")
    assert page_width <= width
    boxes = opened.execute_script(CHART_BOXES)
    assert set(boxes) == {f"chart-{name}" for name in CHARTS}
    for chart_width, chart_height, box_width in boxes.values():
        assert chart_width >= max(670, box_width - 20)
        assert chart_height > 100
    assert opened.execute_script(SMALLEST_TEXT) >= 8  # pixels


def test_charts_are_readable_in_the_dark(opened):
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    try:
        colour = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
        assert opened.execute_script(colour, "body") == "rgb(20, 23, 26)"
        assert opened.execute_script(colour, ".chart") == "rgb(255, 255, 255)"
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_script_from_elsewhere_does_not_run(browser, report, tmp_path):
    page = tmp_path / "injected.html"
    source = report[1].read_text(encoding="utf-8")
    page.write_text(source.replace("</body>", "<script>document.title = 'run'</script></body>"), encoding="utf-8")
    browser.get(page.as_uri())
    assert browser.title != "run"
    assert "Content Security Policy" in browser.console_errors()[0]
