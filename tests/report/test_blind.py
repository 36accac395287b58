from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser

import pytest

from mtl.errors import UserError
from mtl.evaluation.results import Prediction
from mtl.report.blind import write_blind_page

NAMES = ("zq_first", "zq_second")
NASTY = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> 情感 مرحبا 😀 \u2028 \ud83d"


def prediction(text, number=0, prompt="Why?"):
    return Prediction(prompt, "because", text, text.strip(), 0.25, f"test.jsonl:{number}", 0.75, 1, True)


def run_of(name, num_examples, prefix="text"):
    return [prediction(f"{prefix} {i} {name}", i, f"prompt {i}") for i in range(num_examples)]


def both(num_examples):
    return run_of("x", num_examples), run_of("y", num_examples)


class Page(HTMLParser):
    """The tags of a page, its attributes and the text of each script."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.scripts = [], [], []
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data

    @property
    def payload(self):
        return json.loads(self.scripts[0])


def write(tmp_path, predictions, **options):
    path = tmp_path / "blind.html"
    key = write_blind_page(path, NAMES, predictions, **options)
    return Page(path), key, json.loads((tmp_path / "blind_key.json").read_text(encoding="utf-8"))


def test_the_key_says_whose_answer_is_whose(tmp_path):
    page, key, saved = write(tmp_path, {"one": both(7), "two": both(4)})
    assert page.payload["page"] == saved["page"] == key.page
    assert saved["strategies"] == list(NAMES)
    assert saved["num_identical"] == 0
    assert [item["id"] for item in page.payload["items"]] == list(saved["items"]) == [str(i) for i in range(1, 12)]
    assert Counter(item["task"] for item in page.payload["items"]) == {"one": 7, "two": 4}
    for item in page.payload["items"]:
        secret = saved["items"][item["id"]]
        assert secret["task"] == item["task"]
        assert secret["location"] == f"test.jsonl:{item['prompt'].split()[1]}"
        assert item["reference"] == "because"
        texts = ("x", "y") if secret["A"] == 0 else ("y", "x")
        assert (item["A"][-1], item["B"][-1]) == texts


@pytest.mark.parametrize(("num_examples", "first_is_a"), [(20, {10}), (7, {4}), (1, {1})])
def test_each_strategy_is_a_in_half_of_the_items(tmp_path, num_examples, first_is_a):
    _, key, _ = write(tmp_path, {"task": both(num_examples)}, seed=3)
    assert sum(item.A == 0 for item in key.items.values()) in first_is_a


def test_order_and_sides_are_shuffled_by_the_seed(tmp_path):
    def drawn(seed):
        page, key, _ = write(tmp_path, {"one": both(20), "two": both(20)}, seed=seed)
        return page.html, [item.A for item in key.items.values()], [item.task for item in key.items.values()]

    html, sides, tasks = drawn(0)
    assert html == drawn(0)[0]
    assert html != drawn(1)[0]
    assert len(set(zip(sides, tasks, strict=True))) == 4
    assert sides not in ([0, 1] * 20, [1, 0] * 20, sorted(sides))
    assert tasks != sorted(tasks)


def test_global_random_numbers_are_left_alone(tmp_path):
    import random

    random.seed(0)
    state = random.getstate()
    write(tmp_path, {"task": both(9)})
    assert random.getstate() == state


def test_many_examples_are_drawn_from(tmp_path):
    page, key, _ = write(tmp_path, {"one": both(50), "two": both(3)}, max_per_task=5)
    prompts = [item["prompt"] for item in page.payload["items"] if item["task"] == "one"]
    assert len(set(prompts)) == 5
    assert sorted(prompts) != [f"prompt {i}" for i in range(5)]
    assert key.num_identical == 0


def test_the_same_answers_are_left_out_and_counted(tmp_path):
    first = [prediction("same\n", 0), prediction("", 1), prediction("one", 2)]
    second = [prediction(" same", 0), prediction("\n", 1), prediction("another", 2)]
    page, key, saved = write(tmp_path, {"task": (first, second), "alike": both(0)})
    (item,) = page.payload["items"]
    assert {item["A"], item["B"]} == {"one", "another"}
    assert key.num_identical == saved["num_identical"] == 2


def test_nothing_to_judge(tmp_path):
    same = run_of("x", 3)
    with pytest.raises(UserError, match=r"zq_first and zq_second: must have different answers.* all 3 examples"):
        write(tmp_path, {"task": (same, same)})
    assert list(tmp_path.iterdir()) == []


def test_other_examples_are_a_defect(tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write(tmp_path, {"task": (run_of("x", 3), run_of("y", 2))})


def test_the_page_says_nothing_of_strategies_and_scores(tmp_path):
    page, _, _ = write(tmp_path, {"task": both(30)})
    assert "zq_" not in page.html
    assert "0.25" not in page.html
    assert "0.75" not in page.html
    assert {key for item in page.payload["items"] for key in item} == {"id", "task", "prompt", "reference", "A", "B"}


def test_the_page_needs_no_network(tmp_path):
    page, _, _ = write(tmp_path, {"task": both(3)})
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "action", "background"} & names
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    for word in ("http:", "https:", "//cdn", "url(", "@import", "fetch(", "XMLHttp", "WebSocket", "sendBeacon"):
        assert word not in page.html
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert any(name == "content" and value.startswith("default-src 'none'; ") for name, value in page.attributes)


def test_texts_are_data_and_nothing_else(tmp_path):
    first, second = [prediction(NASTY, prompt=NASTY)], [prediction(f"not {NASTY}", prompt=NASTY)]
    page, _, _ = write(tmp_path, {"<b>": (first, second)})
    assert page.tags.count("script") == len(page.scripts) == 2
    assert "img" not in page.tags
    (item,) = page.payload["items"]
    assert {item["A"], item["B"]} == {NASTY, f"not {NASTY}"}
    assert item["prompt"] == NASTY
    assert item["task"] == "<b>"
    plain, _, _ = write(tmp_path, {"task": both(1)})
    assert page.scripts[1] == plain.scripts[1]
