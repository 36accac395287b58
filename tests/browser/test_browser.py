"""The fixture of the other tests here: a complaint or request that it overlooks would never be found."""

from __future__ import annotations

import time

import pytest


def open_page(browser, tmp_path, body):
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{body}", encoding="utf-8")
    browser.get(page.as_uri())
    return page.as_uri()


def test_a_quiet_page(browser, tmp_path):
    url = open_page(
        browser, tmp_path, "<p>情感 😀</p><img src='data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='>"
    )
    assert browser.console_errors() == []
    assert browser.requested_urls() == [url]
    assert browser.execute_script("return document.body.innerText") == "情感 😀"


@pytest.mark.parametrize("script", ["console.error('oh no')", "throw Error('oh no')"])
def test_complaints(browser, tmp_path, script):
    open_page(browser, tmp_path, f"<script>{script}</script>")
    (error,) = browser.console_errors()
    assert "oh no" in error
    assert browser.console_errors() == []


@pytest.mark.parametrize("host", ["example.com", "192.0.2.1"])
def test_nothing_elsewhere_is_reached(browser, tmp_path, host):
    start = time.monotonic()
    url = open_page(browser, tmp_path, f"<script src='https://{host}/x.js'></script>")
    assert time.monotonic() - start < 5
    assert browser.requested_urls() == [url, f"https://{host}/x.js"]
    (error,) = browser.console_errors()
    assert "ERR_NAME_NOT_RESOLVED" in error


def test_a_page_can_be_as_narrow_as_a_phone(browser, tmp_path):
    browser.set_viewport(390, 844)
    open_page(browser, tmp_path, "<p>text</p>")
    assert browser.execute_script("return [innerWidth, innerHeight]") == [390, 844]


def test_downloads(browser, tmp_path):
    browser.save_downloads_in(tmp_path / "saved")
    open_page(browser, tmp_path, "<a download='answers.json' href='data:,42'>save</a>")
    browser.execute_script("document.querySelector('a').click()")
    deadline = time.monotonic() + 10
    while not (tmp_path / "saved/answers.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "saved/answers.json").read_text() == "42"
