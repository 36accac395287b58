"""TensorBoard over a sweep as a user sees it: the table of runs, the tasks' charts, the answers."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from mtl.evaluation.results import Prediction
from mtl.reporting.results import Cost, Results, TaskResult
from mtl.reporting.tensorboard import TensorBoardLog

METRICS = {"inflect": "exact_match", "情感 😀 (v1.0)": "accuracy", "notes": None}
SCORES = {"equal,seed=0": 0.25, "mgda,seed=0": 0.125, "pcgrad,seed=0": 0.5, "pcgrad,seed=1": 0.75}
SURGERY = {"equal": "Mean", "mgda": "MGDA", "pcgrad": "PCGrad", "alone": "Mean"}

# TensorBoard is made of shadow trees, into which selectors do not reach.
FIND_ALL = """
const findAll = (root, selector) => [...root.querySelectorAll("*")].flatMap(element => [
    ...(element.matches(selector) ? [element] : []),
    ...(element.shadowRoot ? findAll(element.shadowRoot, selector) : []),
]);
"""
TABLE = """
const text = cell => cell.querySelector("slot").assignedNodes().map(node => node.textContent.trim()).join(" ");
return findAll(document, "vaadin-grid").flatMap(
    grid => [...grid.shadowRoot.querySelectorAll("tr")].map(row => [...row.children].map(text)));
"""
# A line is drawn twice, as it is and smoothed.
DRAWN = """
const isWide = element => element.getBoundingClientRect().width > 100;
const drawn = card => findAll(card.shadowRoot, "path.line").filter(isWide).length / 2;
"""
OVERLAYS = f"""{DRAWN}
return Object.fromEntries(findAll(document, "tf-custom-scalar-multi-line-chart-card").map(card => [card.title, [
    drawn(card),
    [...card.shadowRoot.querySelectorAll(".match-list-entry")].map(entry => entry.lastChild.textContent.trim()).sort(),
]]));
"""
CHARTS = f"""{DRAWN}
return Object.fromEntries(findAll(document, "tf-scalar-card").map(card => [card.tag, drawn(card)]));
"""
TEXTS = """
return findAll(document, "tf-text-loader").map(
    card => [card.run, card.tag, findAll(card.shadowRoot, "td td").map(cell => cell.innerText)]);
"""


def write_run(folder: Path, name: str, metrics: dict[str, str | None], score: float) -> None:
    """A run of 30 steps and 3 evaluations; no score of MGDA's, it diverged."""
    strategy, _, seed = name.partition(",seed=")
    config = {
        "run_name": name,
        "seed": int(seed),
        "learning_rate": 1e-3,
        "only_task": "notes" if strategy == "alone" else None,
        "sampler": {"_target_": "mtl.samplers.Temperature", "_partial_": True, "temperature": 2.0},
        "weighter": {"_target_": "mtl.weighters.Equal", "_partial_": True},
        "surgery": {"_target_": f"mtl.surgery.{SURGERY[strategy]}", "_partial_": True},
    }
    loss = math.nan if strategy == "mgda" else 1.0
    log = TensorBoardLog(folder / name / "tensorboard", config, metrics)
    for step in range(1, 31):
        values = {task: place + 2 / step for place, task in enumerate(metrics)}
        log.add_step({"step": step, "loss": values, "p": values, "grad_norm": loss, "learning_rate": 0.1})
        if step % 10 == 0:
            evaluation = {
                task: {"loss": loss} | ({metric: score} if metric else {}) for task, metric in metrics.items()
            }
            log.add_evaluation({"step": step, "eval": evaluation, "mean": {"loss_ratio": loss}})
            log.add_predictions(step, "notes", [prediction(f"<b>val</b> {step}")])
    tasks = {
        task: TaskResult(
            metric=metric,
            base={"loss": 2.0},
            val={},
            test={"loss": loss, "num_examples": 50} | ({metric: score} if metric else {}),
            examples_seen=1,
            epochs_seen=1.0,
            target_tokens_seen=1,
        )
        for task, metric in metrics.items()
    }
    log.add_results(30, Results({}, int(seed), "m", tasks, Cost(30, 1, 1, 1.0, 1.0, 1)))
    log.add_predictions(30, "notes", [prediction("test")], split="test")
    log.close(succeeded=True)


def prediction(answer: str) -> Prediction:
    return Prediction("prompt", "reference", answer, answer, 0.5, "file:1", 1.0, 1, True)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Four runs, and a reference of one task."""
    folder = tmp_path_factory.mktemp("sweep")
    write_run(folder, "alone,seed=0", {"notes": None}, 0.0)
    for name, score in SCORES.items():
        write_run(folder, name, METRICS, score)
    return folder


@pytest.fixture(scope="module")
def tensorboard(sweep):
    """TensorBoard's address once it has read all runs."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", sweep, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen([*command, "--reload_multifile", "true"], stderr=subprocess.PIPE, text=True) as server:
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        yield address
        server.terminate()
        server.wait(20)  # before its stderr is closed: it says goodbye there, and would live on if it could not


@pytest.fixture
def shown(browser, tensorboard):
    """Waits until a tab shows what a script finds in the way that is asked for."""

    def wait_for(tab, script, is_right):
        browser.get(f"{tensorboard}/#{tab}")
        found = None

        def look(_):
            nonlocal found
            found = browser.execute_script(FIND_ALL + script)
            return is_right(found)

        try:
            WebDriverWait(browser, 20, poll_frequency=0.25).until(look)
        except Exception as error:
            raise AssertionError(f"{tab} shows {found}") from error
        assert browser.console_errors() == []
        assert all(url.startswith(tensorboard) for url in browser.requested_urls())
        return found

    yield wait_for


def test_the_table_compares_the_runs(shown):
    table = shown("hparams", TABLE, lambda rows: sum(bool(row[0]) for row in rows) == 1 + len(SCORES) + 1)
    header, *rows = [row for row in table if row[0]]
    assert header[2:] == [
        *("Strategy", "sampler", "seed", "surgery", "weighter"),
        *("test/score/mean", "test/loss_ratio/mean"),
        *("test/exact_match/inflect", "test/accuracy/情感 😀 (v1.0)", "test/loss/inflect"),
    ]
    runs = {row[0].partition("/")[0]: row[2:9] for row in rows}
    for name, score in SCORES.items():
        strategy, _, seed = name.partition(",seed=")
        *hyperparameters, mean_score, mean_ratio = runs[name]
        assert hyperparameters == [strategy, "Temperature", seed, SURGERY[strategy], "Equal"]
        assert float(mean_score) == score
        assert float(mean_ratio) == pytest.approx(math.nan if strategy == "mgda" else 0.5, nan_ok=True)
    assert runs["alone,seed=0"][:2] == ["alone", "Temperature"]


def test_the_tasks_of_a_run_overlay(shown):
    """Without the task whose name has parentheses: it would be taken for a run's."""
    lines = [f"{task} ({name}/tensorboard)" for task in ("inflect", "notes") for name in SCORES]
    lines.append("notes (alone,seed=0/tensorboard)")
    expected = {
        group: [len(lines), sorted(f"{group}/{line}" for line in lines)] for group in ("train/loss", "sampler/prob")
    }

    def is_right(charts):
        return {group: charts.get(group) for group in expected} == expected

    charts = shown("custom_scalars", OVERLAYS, is_right)
    assert set(charts) > {"eval/loss", "eval/exact_match", "eval/accuracy"}


def test_the_runs_of_a_task_overlay(shown):
    expected = dict.fromkeys(["eval/exact_match/inflect", "eval/accuracy/情感 😀 (v1.0)"], len(SCORES))
    shown("scalars", CHARTS, lambda charts: expected.items() <= charts.items())


def test_answers_stand_beside_their_references(shown):
    def row(answer):
        return ["prompt", "reference", answer, "0.500"]

    texts = shown("text", TEXTS, lambda texts: len(texts) == 10 and all(cells for *_, cells in texts))
    found = {(run.partition("/")[0], tag): cells for run, tag, cells in texts}
    for name in ("alone,seed=0", *SCORES):
        validation = [cell for step in (30, 20, 10) for cell in row(f"<b>val</b> {step}")]
        assert found[name, "predictions/notes/text_summary"] == validation
        assert found[name, "predictions/test/notes/text_summary"] == row("test")


def test_pictures_of_a_sweep(sweep, tmp_path, browser):
    script = Path(__file__).parents[2] / "experiments/screenshot_tensorboard.py"
    subprocess.run([sys.executable, script, sweep, tmp_path, "--overlay", "pcgrad"], check=True, timeout=120)
    for name, height in (("hparams", 700), ("tasks", 1100), ("overlays", 1100)):
        content = (tmp_path / f"{name}.png").read_bytes()
        assert struct.unpack(">II", content[16:24]) == (1800, height)
        assert len(content) > 20_000  # an empty page has less
