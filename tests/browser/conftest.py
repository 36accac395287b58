"""A headless Chromium that reaches nothing but this machine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-proxy-server",
    "--force-device-scale-factor=1",
    "--lang=en",
    # Every other name or address fails at once, and so shows in the console.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


class Browser(webdriver.Chrome):
    """Chromium, and what its pages complain of and ask for."""

    def set_viewport(self, width: int, height: int) -> None:
        """Gives pages this many CSS pixels; a window cannot be narrower than about 500."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def save_downloads_in(self, folder: Path) -> None:
        """Lets pages save files, without asking."""
        self.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})

    def console_errors(self) -> list[str]:
        """Errors since the last call: exceptions, ``console.error``, what could not be loaded."""
        return [entry["message"] for entry in self.get_log("browser") if entry["level"] == "SEVERE"]

    def requested_urls(self) -> list[str]:
        """Addresses that pages have asked for since the last call, except ``data:`` and ``blob:``, which ask no one."""
        events = [json.loads(entry["message"])["message"] for entry in self.get_log("performance")]
        sent = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [request["url"] for request in sent if not request["url"].startswith(("data:", "blob:"))]


@pytest.fixture(scope="session")
def _chromium() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver must be on the PATH: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's sandbox refuses root
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "localhost")  # selenium would ask a proxy for the driver
        browser = Browser(options=options, service=Service(driver))
        yield browser
        browser.quit()


@pytest.fixture
def browser(_chromium: Browser) -> Browser:
    """The session's browser on an empty page of 1280 x 900 pixels, with empty logs."""
    _chromium.get("about:blank")
    _chromium.set_viewport(1280, 900)
    _chromium.console_errors()
    _chromium.requested_urls()
    return _chromium
