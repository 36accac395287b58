from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from mtl.errors import UserError
from mtl.report.judgements import fleiss_kappa, print_judgements, read_judgements

PAGE = "0123456789abcdef"


@pytest.fixture
def key(tmp_path):
    """Twelve items of two tasks; A is the first strategy where the number is odd."""
    items = {
        str(i): {"task": "one" if i <= 8 else "two", "location": f"test.jsonl:{i}", "A": (i + 1) % 2}
        for i in range(1, 13)
    }
    path = tmp_path / "blind_key.json"
    content = {"page": PAGE, "strategies": ["equal", "pcgrad"], "num_identical": 4, "items": items}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def judge(tmp_path):
    def save(name, choices, **changes):
        """One letter an item: A, B, t for a tie, . for none."""
        full = {"A": "A", "B": "B", "t": "tie"}
        rows = [
            {"item": str(i), "choice": full[choice], "seconds": float(i)}
            for i, choice in enumerate(choices, start=1)
            if choice != "."
        ]
        path = tmp_path / f"{name}.json"
        content = {"page": PAGE, "judge": name, "judgements": rows} | changes
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return save


def printed(judgements):
    console = Console(file=StringIO(), width=200, emoji=False)
    print_judgements(console, judgements)
    return console.file.getvalue()


def test_one_judge_who_prefers_the_first(key, judge):
    found = read_judgements([judge("Ann", "ABABABABABtA")], key)
    assert found.overall.wins == (10, 1)
    assert found.overall.ties == 1
    assert found.overall.p == pytest.approx(2 * (1 + 11) / 2**11)
    assert {task: (item.wins, item.ties) for task, item in found.tasks.items()} == {
        "one": ((8, 0), 0),
        "two": ((2, 1), 1),
    }
    assert found.tasks["one"].p == pytest.approx(2 * 2 / 2**8)  # the smaller of two, times two
    assert found.tasks["two"].p == 1.0
    assert found.agreement is None
    assert found.median_seconds == 6.5


def test_who_always_presses_a_prefers_nobody(key, judge):
    found = read_judgements([judge("Ann", "A" * 12)], key)
    assert found.overall.wins == (6, 6)
    assert found.overall.p == 1.0


def test_ties_alone(key, judge):
    found = read_judgements([judge("Ann", "t" * 12)], key)
    assert (found.overall.wins, found.overall.ties, found.overall.p) == ((0, 0), 12, 1.0)


def test_items_not_judged_count_for_nothing(key, judge):
    found = read_judgements([judge("Ann", "A...........")], key)
    assert found.overall.wins == (1, 0)
    assert found.overall.ties == 0
    assert list(found.tasks) == ["one"]
    assert "1 of 12 items judged by Ann" in printed(found)


def test_the_majority_of_judges_decides_an_item(key, judge):
    # first strategy: A for odd items, B for even ones
    files = [judge("Ann", "AB" + "A" + "." * 9), judge("Bob", "AA" + "t" + "." * 9), judge("Cid", "Bt" + "B" + "." * 9)]
    found = read_judgements(files, key)
    assert found.overall.wins == (1, 0)
    assert found.overall.ties == 2
    assert found.judges == ["Ann", "Bob", "Cid"]


def test_several_judges_do_not_make_more_items(key, judge):
    """The sign test counts items: judges of one item are no independent trials."""
    choices = "ABABABABABAB"
    p_of_one = read_judgements([judge("Ann", choices)], key).overall.p
    p_of_three = read_judgements([judge(name, choices) for name in ("Ann", "Bob", "Cid")], key).overall.p
    assert p_of_one == p_of_three == pytest.approx(binomtest(12, 12).pvalue)


def test_two_judges_agree_by_cohen(key, judge):
    first, second = "AABBtAABBtAB", "AABBtABBAtA."
    found = read_judgements([judge("Ann", first), judge("Bob", second)], key)
    assert found.agreement.num_items == 11
    assert found.agreement.share == pytest.approx(9 / 11)
    # by hand: agreement by chance is the sum over choices of the product of their shares
    by_chance = (5 * 5 + 4 * 4 + 2 * 2) / 11**2
    assert found.agreement.kappa == pytest.approx((9 / 11 - by_chance) / (1 - by_chance))
    assert "agree in 82% of 11 items that all judged; kappa (Cohen) 0.71" in printed(found)


def test_cohen_counts_buttons_and_not_strategies(key, judge):
    """Both prefer the first strategy but once each: by strategy, agreement would be no better than chance."""
    first, second = "ABABABABABAA", "ABABABABABBB"
    by_strategy = cohen_kappa_score([0] * 11 + [1], [0] * 10 + [1, 0])
    assert by_strategy < 0
    found = read_judgements([judge("Ann", first), judge("Bob", second)], key)
    assert found.agreement.kappa > 0.6


def test_three_judges_agree_by_fleiss(key, judge):
    rows = ["AAB.........", "AAB.........", "ABt........A"]
    found = read_judgements([judge(name, row) for name, row in zip("xyz", rows, strict=True)], key)
    assert found.agreement.num_items == 3
    assert found.agreement.share == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert found.agreement.kappa == pytest.approx(fleiss_kappa([[3, 0, 0], [2, 1, 0], [0, 2, 1]]))
    assert "kappa (Fleiss)" in printed(found)


def test_fleiss_worked_example():
    """Ten subjects, fourteen raters, five categories: 0.210 (the example that textbooks and Wikipedia give)."""
    counts = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert fleiss_kappa(counts) == pytest.approx(0.20993, abs=1e-5)


def test_fleiss_properties():
    assert fleiss_kappa([[3, 0], [0, 3]]) == pytest.approx(1.0)
    assert fleiss_kappa([[2, 0], [2, 0]]) is None
    assert fleiss_kappa([[1, 1], [1, 1]]) == pytest.approx(-1.0)
    rng = np.random.default_rng(0)
    assert fleiss_kappa(rng.multinomial(5, [0.5, 0.3, 0.2], size=20_000)) == pytest.approx(0.0, abs=0.01)


def test_fleiss_of_two_is_scotts_pi():
    rng = np.random.default_rng(0)
    first, second = rng.integers(3, size=(2, 50))
    second = np.where(rng.random(50) < 0.5, first, second)
    counts = np.eye(3)[first] + np.eye(3)[second]
    shares = counts.sum(axis=0) / 100
    expected = (np.mean(first == second) - shares @ shares) / (1 - shares @ shares)
    assert fleiss_kappa(counts) == pytest.approx(expected)


@pytest.mark.parametrize("num_judges", [2, 3])
def test_all_choices_the_same(key, judge, num_judges):
    found = read_judgements([judge(f"judge {i}", "t" * 12) for i in range(num_judges)], key)
    assert found.agreement.share == 1.0
    assert found.agreement.kappa is None
    assert "not defined" in printed(found)


def test_two_judges_who_each_press_one_button(key, judge):
    found = read_judgements([judge("Ann", "A" * 12), judge("Bob", "B" * 12)], key)
    assert (found.agreement.share, found.agreement.kappa) == (0.0, 0.0)


def test_judges_without_a_common_item(key, judge):
    found = read_judgements([judge("Ann", "A" + "." * 11), judge("Bob", "." * 11 + "A")], key)
    assert found.agreement is None
    assert found.overall.wins == (1, 1)
    assert "no item was judged by all" in printed(found)


def test_the_table(key, judge):
    text = printed(read_judgements([judge("[red]Ann 😀", "ABABABABABtA")], key))
    lines = [line.split() for line in text.splitlines()]
    assert ["preferred", "by", "most", "judges", "equal", "pcgrad", "ties", "p"] in lines
    assert ["all", "items", "10", "1", "1", "0.0117"] in lines
    assert ["one", "8", "0", "0", "0.0156"] in lines
    assert "[red]Ann 😀" in text
    assert "4 examples with equal answers left out" in text


def test_a_strategy_against_itself(key, judge):
    content = json.loads(key.read_text())
    key.write_text(json.dumps(content | {"strategies": ["equal", "equal"]}))
    assert read_judgements([judge("Ann", "AB")], key).overall.wins == (2, 0)


def test_a_judge_counts_once(key, judge, tmp_path):
    first = judge("Ann", "AB")
    copy = tmp_path / "copy.json"
    copy.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"copy\.json: must be of another judge.*'Ann'"):
        read_judgements([first, copy], key)


def test_judgements_of_another_page(key, judge):
    with pytest.raises(UserError, match=rf"Ann\.json: must be of page {PAGE}.*is of page other"):
        read_judgements([judge("Ann", "AB", page="other")], key)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judgements": []}, "has none"),
        ({"judgements": [{"item": "99", "choice": "A", "seconds": 1}]}, "item 99 must be on the page"),
        ({"judgements": [{"item": "1", "choice": "C", "seconds": 1}]}, "one of A, B, tie, found 'C'"),
        ({"judgements": [{"item": "1", "choice": "A"}]}, "KeyError.'seconds'"),
        ({"judgements": [{"item": "1", "choice": "A", "seconds": "long"}]}, "could not convert"),
        ({"judgements": 7}, "not iterable"),
        ({"judgements": ["A"]}, "must be judgements"),
    ],
)
def test_damaged_judgements(key, judge, changes, said):
    with pytest.raises(UserError, match=said) as error:
        read_judgements([judge("Ann", "AB", **changes)], key)
    assert str(error.value).startswith(f"{key.parent}/Ann.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"), [("", "must be JSON"), ("[]", "found list"), ("{}", "KeyError"), ("\ud83d", "must be JSON")]
)
def test_files_of_another_kind(key, judge, tmp_path, content, said):
    other = tmp_path / "other.json"
    other.write_bytes(content.encode("utf-8", "surrogatepass"))
    for paths, key_path in [([other], key), ([judge("Ann", "AB")], other)]:
        with pytest.raises(UserError, match=said) as error:
            read_judgements(paths, key_path)
        assert str(error.value).startswith(f"{other}: ")


def test_judgements_given_as_the_key(key, judge):
    with pytest.raises(UserError, match="must be the key of a blind page"):
        read_judgements([judge("Ann", "AB")], judge("Bob", "AB"))


def test_a_missing_file(key, judge, tmp_path):
    with pytest.raises(UserError, match=r"none\.json: must be a file saved by the blind page, found: No such file"):
        read_judgements([tmp_path / "none.json"], key)
    with pytest.raises(UserError, match=r"none\.json: must be the blind_key\.json .*No such file"):
        read_judgements([judge("Ann", "AB")], tmp_path / "none.json")
