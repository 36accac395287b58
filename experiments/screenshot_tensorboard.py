"""Pictures of TensorBoard over a sweep: its table of runs, a chart for each task, and the tasks in overlaid charts.

    python experiments/screenshot_tensorboard.py multirun/<date>/<time> pictures --overlay '^pcgrad,seed=0'

Needs chromium, chromedriver and selenium: ``.ci/run`` and ``pip install -e ".[test]"`` install them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

WIDTH = 1800  # CSS pixels: the table's hyperparameters and means fit
SETTLE = 3.0  # seconds for the charts' animation

# TensorBoard is made of shadow trees, into which selectors do not reach.
FIND_ALL = """
const findAll = (root, selector) => [...root.querySelectorAll("*")].flatMap(element => [
    ...(element.matches(selector) ? [element] : []),
    ...(element.shadowRoot ? findAll(element.shadowRoot, selector) : []),
]);
"""
NUM_RUNS = """
return findAll(document, "vaadin-grid").flatMap(grid => [...grid.shadowRoot.querySelectorAll("tbody tr")])
    .filter(row => row.getBoundingClientRect().height > 0).length;
"""
NUM_CHARTS = 'return document.querySelectorAll("card-view line-chart").length;'
NUM_OVERLAYS = 'return findAll(document, "path.line").length;'
CLOSE_SETTINGS = 'document.querySelector("metrics-main-view .settings-button.checked")?.click();'
FILTER_RUNS = 'for (const runs of findAll(document, "tf-multi-checkbox")) runs.regex = arguments[0];'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("logdir", type=Path, help="folder of the sweep")
    parser.add_argument("out_dir", type=Path, help="where hparams.png, tasks.png and overlays.png go")
    parser.add_argument("--tags", default="^eval/(?!loss|.*/mean$)", help="tags that get a chart in tasks.png (regex)")
    parser.add_argument("--overlay", default="", help="runs in overlays.png, by default all (regex)")
    arguments = parser.parse_args()
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    with tensorboard(arguments.logdir) as address, chromium() as browser:
        photograph(browser, f"{address}/#hparams", NUM_RUNS, arguments.out_dir / "hparams.png", height=700)
        charts = f"{address}/?tagFilter={quote(arguments.tags)}#timeseries"
        photograph(browser, charts, NUM_CHARTS, arguments.out_dir / "tasks.png", CLOSE_SETTINGS)
        overlays = f"{address}/#custom_scalars"
        photograph(browser, overlays, NUM_OVERLAYS, arguments.out_dir / "overlays.png", FILTER_RUNS, arguments.overlay)


def photograph(
    browser: webdriver.Chrome, address: str, count: str, picture: Path, act: str = "", *values: str, height: int = 1100
) -> None:
    """Saves a page once ``count`` finds something on it, after the script ``act``, which gets the values."""
    metrics = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(address)
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(FIND_ALL + count))
    browser.execute_script(FIND_ALL + act, *values)
    time.sleep(SETTLE)
    browser.save_screenshot(str(picture))
    print(picture)


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """TensorBoard's address on this machine."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            yield next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        finally:
            server.terminate()
            server.wait(20)


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A headless browser."""
    programs = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if None in programs:
        sys.exit("chromium and chromedriver must be on the PATH: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location, driver = programs
    for flag in ("--headless=new", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's sandbox refuses root
    with webdriver.Chrome(options=options, service=Service(driver)) as browser:
        yield browser


if __name__ == "__main__":
    main()
