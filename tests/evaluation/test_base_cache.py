from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from mtl.evaluation import base_cache
from mtl.evaluation.base_cache import evaluate_base
from mtl.evaluation.evaluate import evaluate

OPTIONS = ("ja", "不是 🙅")


@pytest.fixture
def tasks(make_data, rows):
    return [
        make_data(rows, name="free", fingerprint="1", max_new_tokens=4, answer_pattern="(.)"),
        make_data(
            [("p", "ja", OPTIONS)],
            name="labels",
            fingerprint="2",
            metric="accuracy",
            scoring="likelihood",
            labels=OPTIONS,
        ),
    ]


@pytest.fixture
def run(model, tokenizer, alone, no_adapters, tmp_path, monkeypatch):
    """Evaluates through the cache; the names of the tasks that were computed come along."""
    computed = []

    def counting(model, tokenizer, activate, data, **settings):
        assert settings["base"]
        computed.extend(task_data.task.name for task_data in data)
        return evaluate(model, tokenizer, activate, data, **settings)

    monkeypatch.setattr(base_cache, "evaluate", counting)

    def run(data, **changed):
        computed.clear()
        settings = {
            "split": "val",
            "max_examples": None,
            "predict": True,
            "distributed": alone,
            "token_budget": 500,
            "cache_dir": tmp_path,
            "model_fingerprint": "m",
            "dtype": "float64",
        }
        return evaluate_base(model, tokenizer, no_adapters, data, **(settings | changed)), list(computed)

    return run


def test_a_second_run_reads_the_very_same_numbers(run, tasks):
    first, computed = run(tasks)
    assert computed == ["free", "labels"]
    second, computed = run(tasks)
    assert computed == []
    assert second == first


def test_a_further_task_costs_only_itself(run, tasks):
    run(tasks[:1])
    assert run(tasks)[1] == ["labels"]


@pytest.mark.parametrize(
    "changed",
    [
        {"split": "test"},
        {"max_examples": 1},
        {"predict": False},
        {"model_fingerprint": "other"},
        {"dtype": "bfloat16"},
    ],
)
def test_other_settings_are_computed_anew(run, tasks, changed):
    run(tasks)
    assert run(tasks, **changed)[1] == ["free", "labels"]


@pytest.mark.parametrize(
    "changed", [{"fingerprint": "3"}, {"answer_pattern": "(..)"}, {"max_new_tokens": 5}, {"metric": "rougeL"}]
)
def test_another_task_is_computed_anew(run, tasks, make_data, rows, changed):
    run(tasks)
    fields = {"name": "free", "fingerprint": "1", "max_new_tokens": 4, "answer_pattern": "(.)"} | changed
    assert run([make_data(rows, **fields)])[1] == ["free"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00" * 20,
        lambda text: text.replace('"num_examples": 7', '"num_examples": 8'),
        lambda text: json.dumps({**json.loads(text), "evaluation": {}}),
    ],
)
def test_a_damaged_file_is_not_trusted(run, tasks, tmp_path, damage):
    first, _ = run(tasks[:1])
    [path] = (tmp_path / "base").iterdir()
    whole = path.read_text(encoding="utf-8")
    damaged = damage(whole)
    assert damaged != whole
    path.write_text(damaged, encoding="utf-8")
    assert run(tasks[:1]) == (first, ["free"])
    assert path.read_text(encoding="utf-8") == whole


def test_only_rank_0_touches_files(run, tasks, tmp_path, monkeypatch):
    [stored], _ = run(tasks[:1])
    sent = []
    hit = SimpleNamespace(
        rank=1, world_size=2, sharded=False, gather=lambda value: sent.append(value) or [stored, value]
    )
    assert run(tasks[:1], distributed=hit) == ([stored], [])
    assert sent == [None]

    monkeypatch.setattr(base_cache, "evaluate", lambda *args, **settings: [stored])
    miss = SimpleNamespace(rank=1, world_size=2, sharded=False, gather=lambda value: [None, value])
    assert run(tasks[:1], distributed=miss, cache_dir=tmp_path / "empty") == ([stored], [])
    assert not (tmp_path / "empty").exists()


def test_nothing_half_written_stays(run, tasks, tmp_path):
    run(tasks)
    assert sorted(path.suffix for path in (tmp_path / "base").iterdir()) == [".json", ".json"]
