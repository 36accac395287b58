"""A judge at work: from the blind page by keys and clicks to a file that ``read_judgements`` reads."""

from __future__ import annotations

import json
import time

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from mtl.evaluation.results import Prediction
from mtl.report.blind import write_blind_page
from mtl.report.judgements import read_judgements

NASTY = "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"


def prediction(text, number):
    prompt = f"{NASTY}\nQuestion {number}: 情感 مرحبا 😀 " + "long" * 200
    return Prediction(prompt, f"reference {number}", text, text, 0.0, f"test.jsonl:{number}", 1.0, 1, True)


@pytest.fixture
def page(tmp_path):
    runs = [[prediction(f"{name} {i} {NASTY}", i) for i in range(4)] for name in ("x", "y")]
    runs[1][3] = prediction("", 3)
    write_blind_page(tmp_path / "blind.html", ("equal", "pcgrad"), {"task_" + "x" * 90: tuple(runs)})
    return tmp_path / "blind.html"


@pytest.fixture
def judge(browser, page):
    browser.get(page.as_uri())
    browser.execute_script("localStorage.clear()")
    browser.get(page.as_uri())
    return browser


def press(browser, *keys):
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def text_of(browser, name):
    return browser.find_element(By.ID, name).text


def saved(folder, name):
    deadline = time.monotonic() + 10
    while not (folder / name).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_judging_by_keys(judge, page, tmp_path):
    key = json.loads((tmp_path / "blind_key.json").read_text(encoding="utf-8"))
    judge.save_downloads_in(tmp_path / "saved")
    judge.requested_urls()
    assert text_of(judge, "place") == "1 of 4"
    press(judge, "1", "2", "3")
    assert text_of(judge, "place") == "4 of 4"
    press(judge, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert text_of(judge, "place") == "1 of 4"
    press(judge, "2")  # on second thoughts
    assert text_of(judge, "place") == "2 of 4"
    time.sleep(0.3)
    press(judge, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    name = judge.find_element(By.ID, "judge")
    name.send_keys("Ann 3/1 李" + Keys.ENTER)
    content = saved(tmp_path / "saved", "judgements-Ann-3-1-李.json")
    assert content["page"] == key["page"]
    assert content["judge"] == "Ann 3/1 李"
    assert [(row["item"], row["choice"]) for row in content["judgements"]] == [("1", "B"), ("2", "B"), ("3", "tie")]
    assert 0.3 <= content["judgements"][1]["seconds"] < 5
    assert "3 of 4 judgements saved" in text_of(judge, "status")
    found = read_judgements([tmp_path / "saved/judgements-Ann-3-1-李.json"], tmp_path / "blind_key.json")
    seconds_preferred = sum(key["items"][item]["A"] == 0 for item in "12")
    assert found.overall.wins == (2 - seconds_preferred, seconds_preferred)
    assert found.overall.ties == 1
    assert judge.console_errors() == []
    assert judge.requested_urls() == []


def test_judging_by_clicks(judge):
    for choice in ("A", "tie"):
        judge.find_element(By.CSS_SELECTOR, f"[data-choice={choice}]").click()
    judge.find_element(By.ID, "previous").click()
    pressed = judge.find_elements(By.CSS_SELECTOR, "[aria-pressed=true]")
    assert [button.get_attribute("data-choice") for button in pressed] == ["tie"]
    judge.find_element(By.ID, "previous").click()
    assert not judge.find_element(By.ID, "previous").is_enabled()
    assert judge.find_element(By.CSS_SELECTOR, ".chosen").get_attribute("data-answer") == "A"


def test_a_name_is_asked_for(judge, tmp_path):
    judge.save_downloads_in(tmp_path / "saved")
    press(judge, "1")
    name = judge.find_element(By.ID, "judge")
    name.send_keys("  " + Keys.ENTER)
    assert text_of(judge, "status") == "Please enter your name."
    assert not (tmp_path / "saved").exists()
    name.send_keys("1r")  # a name, not a judgement
    assert text_of(judge, "place") == "2 of 4"
    assert not judge.find_element(By.ID, "reference").is_displayed()


def test_the_reference_is_shown_on_demand_and_for_one_item(judge):
    reference = judge.find_element(By.ID, "reference")
    assert not reference.is_displayed()
    press(judge, "r")
    assert reference.is_displayed()
    assert reference.text.startswith("reference ")
    press(judge, "1")
    assert not reference.is_displayed()


def test_progress_outlives_the_page(judge, page):
    press(judge, "1", "2")
    judge.find_element(By.ID, "judge").send_keys("Ann")
    judge.get(page.as_uri())
    assert text_of(judge, "place") == "3 of 4"
    assert judge.find_element(By.ID, "progress").get_attribute("value") == "2"
    assert judge.find_element(By.ID, "judge").get_attribute("value") == "Ann"


def test_without_storage(judge, page, tmp_path):
    script = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied'); } })"
    added = judge.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    judge.save_downloads_in(tmp_path / "saved")
    try:
        judge.get(page.as_uri())
        press(judge, "1", "2", "3", "1")
    finally:
        judge.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    assert text_of(judge, "status") == "All are judged: save them."
    judge.find_element(By.ID, "judge").send_keys("Bob" + Keys.ENTER)
    assert len(saved(tmp_path / "saved", "judgements-Bob.json")["judgements"]) == 4
    assert judge.console_errors() == []


def test_texts_are_text(judge, page):
    payload = json.loads(judge.find_element(By.ID, "payload").get_attribute("textContent"))
    for item in payload["items"]:
        for field in ("prompt", "A", "B"):
            shown = judge.execute_script(f"return document.getElementById('{field}').textContent")
            assert shown == (item[field] or "(empty)")
        press(judge, Keys.ARROW_RIGHT)
    assert judge.title == "Which answer is better?"
    assert judge.find_elements(By.TAG_NAME, "img") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(judge, width):
    judge.set_viewport(width, 844)
    assert judge.execute_script("return document.documentElement.scrollWidth") <= width
    a, b = (judge.find_element(By.CSS_SELECTOR, f"[data-answer={side}]").rect for side in "AB")
    assert (a["y"] == b["y"]) == (width == 1280)  # side by side, or one below the other
    assert min(a["width"], b["width"]) > 300
