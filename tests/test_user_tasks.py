"""A user's own tasks, from the command line to results: sizes, names, scripts, formats, strategies of their own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl.cli import main

CHINESE, EMOJI, SPACED = "情感分类", "笑 😀🎉", "Q&A (3 words)"


@pytest.fixture
def train(tmp_path, monkeypatch, tiny_folder, capsys):
    """Runs ``mtl train tasks=none`` on the tiny model in a folder of its own; gives ``results.json``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    fixed = ["tasks=none", f"model.name_or_path={tiny_folder}", "output_dir=out", "batch_size=4"]
    limits = ["stages.joint.max_steps=2", "max_eval_examples=2", "max_test_examples=2"]

    def run(*overrides, options=()):
        assert main(["train", *options, *fixed, *limits, *overrides]) == 0, capsys.readouterr().err
        return json.loads(Path("out/results.json").read_text(encoding="utf-8"))

    return run


def write_rows(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")


def sums(num_rows):
    return [{"prompt": f"{n} + 1?", "completion": str(n + 1)} for n in range(num_rows)]


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_task_of_20_rows_beside_one_of_4000(train):
    write_rows("small.jsonl", sums(20))
    write_rows("large/train.jsonl", sums(4000))
    results = train(
        "tasks.small.path=small.jsonl",
        "tasks.large.path=large",
        "tasks.small.max_new_tokens=2",
        "tasks.large.max_new_tokens=2",
        "sampler.temperature=inf",
        "stages.joint.max_steps=12",
        "evals_per_stage=1",
    )
    seen = {name: task["examples_seen"] for name, task in results["tasks"].items()}
    assert seen == {"small": 24, "large": 24}
    assert results["tasks"]["small"]["epochs_seen"] == pytest.approx(24 / 16)  # 2 rows each for validation and test
    assert results["tasks"]["large"]["epochs_seen"] == pytest.approx(24 / 3200)
    assert results["tasks"]["large"]["test"]["num_examples"] == 2


def test_names_prompts_and_answers_in_any_script(train):
    rows = [{"prompt": f"这部电影怎么样?第{n}遍 🎬", "completion": ("好 👍", "坏")[n % 2]} for n in range(20)]
    for name in (CHINESE, EMOJI, SPACED):
        write_rows(f"数据/{name}.jsonl", rows)
    results = train(
        f"tasks.{CHINESE}.path=数据/{CHINESE}.jsonl",
        f"tasks.{CHINESE}.labels=['好 👍',坏]",
        f"tasks.{EMOJI}.path=数据/{EMOJI}.jsonl",
        f"tasks.{SPACED}.path='数据/{SPACED}.jsonl'",
        f"tasks.{SPACED}.max_new_tokens=4",
        f"tasks.{EMOJI}.max_new_tokens=4",
        "weighter=static",
        f"weighter.weights={{{CHINESE}: 2}}",
        "surgery=pcgrad",
        "batch_size=6",
    )
    names = [CHINESE, EMOJI, SPACED]
    assert list(results["tasks"]) == names
    assert results["tasks"][CHINESE]["metric"] == "accuracy"
    tags = set(EventAccumulator("out/tensorboard").Reload().Tags()["scalars"])
    for name in names:
        predictions = read_lines(f"out/predictions/{name}.jsonl")
        assert {row["reference"] for row in predictions} <= {"好 👍", "坏"}
        assert all(row["prompt"].startswith("这部电影") and row["prompt"].endswith("🎬") for row in predictions)
        assert Path(f"out/adapters/{name}/adapter_model.safetensors").is_file()
        assert {f"train/loss/{name}", f"eval/loss/{name}", f"sampler/prob/{name}"} <= tags
    config = Path("out/config.yaml").read_text(encoding="utf-8")
    assert f"{CHINESE}: 2" in config
    first = next(line for line in read_lines("out/metrics.jsonl") if line["step"] == 1)
    assert CHINESE in json.dumps(first, ensure_ascii=False)


def test_three_tasks_in_chinese(train):
    questions = {
        "翻译": [{"prompt": f"把“苹果{n}”译成英文。", "completion": f"apple {n}"} for n in range(20)],
        "摘要": [
            {"instruction": "概括下文。", "input": f"今天下了第{n}场雨。", "output": f"第{n}场雨"} for n in range(20)
        ],
        "问答": [
            {"messages": [{"role": "user", "content": f"{n}加一?"}, {"role": "assistant", "content": f"是{n + 1}。"}]}
            for n in range(20)
        ],
    }
    for name, rows in questions.items():
        write_rows(f"{name}/train.jsonl", rows)
    paths = [f"tasks.{name}.path={name}" for name in questions]
    results = train(*paths, *[f"tasks.{name}.max_new_tokens=3" for name in questions], "batch_size=6")
    for name, task in results["tasks"].items():
        assert task["examples_seen"] > 0
        assert 0 < task["test"]["loss"] < 20
        assert len(read_lines(f"out/predictions/{name}.jsonl")) == 2


def test_csv_and_parquet(train):
    import pyarrow
    import pyarrow.parquet

    with Path("table.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows({"prompt": f'Say "{n}",\nplease', "completion": f"{n}, then"} for n in range(20))
    columns = {"instruction": [f"Count to {n}" for n in range(20)], "output": [f"1 to {n}" for n in range(20)]}
    Path("columns").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), "columns/train.parquet")
    results = train(
        "tasks.table.path=table.csv",
        "tasks.columns.path=columns",
        "tasks.table.max_new_tokens=2",
        "tasks.columns.max_new_tokens=2",
    )
    assert {name: task["metric"] for name, task in results["tasks"].items()} == {"table": "chrf", "columns": "chrf"}
    (prediction, *_) = read_lines("out/predictions/table.jsonl")
    assert prediction["prompt"].startswith('Say "')
    assert prediction["prompt"].endswith('",\nplease')


OWN_SAMPLER = """
class FirstOnly:
    def __init__(self, sizes, names, favourite):
        self.probabilities = [float(name == favourite) for name in names]

    def counts(self, num_examples):
        return [int(p * num_examples) for p in self.probabilities]

    def update(self, feedback):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
"""
OWN_CONFIG = """# Only the favourite.
_target_: first_only_sampler.FirstOnly
_partial_: true
favourite: b
"""


def test_sampler_of_the_users_own(train, tmp_path, monkeypatch):
    (tmp_path / "first_only_sampler.py").write_text(OWN_SAMPLER)
    monkeypatch.syspath_prepend(tmp_path)
    write_rows("conf/README.md", [])
    Path("conf/sampler").mkdir()
    Path("conf/sampler/first_only.yaml").write_text(OWN_CONFIG)
    for name in "ab":
        write_rows(f"{name}.jsonl", sums(20))
    tasks = ["tasks.a.path=a.jsonl", "tasks.b.path=b.jsonl", "tasks.a.max_new_tokens=2", "tasks.b.max_new_tokens=2"]
    results = train(*tasks, "sampler=first_only", options=["--config-dir", "conf"])
    assert {name: task["examples_seen"] for name, task in results["tasks"].items()} == {"a": 0, "b": 8}
    assert results["strategy"]["sampler"] == "FirstOnly"


def test_second_stage_on_named_tasks(train):
    for name in ("a", "b", "任务"):
        write_rows(f"{name}.jsonl", sums(20))
    results = train(
        *[f"tasks.{name}.path={name}.jsonl" for name in ("a", "b", "任务")],
        *[f"tasks.{name}.max_new_tokens=2" for name in ("a", "b", "任务")],
        "stages=joint_then_weak",
        "stages.weak.tasks=[任务,a]",
        "stages.weak.max_steps=3",
        "stages.weak.batch_size=2",
        "sampler=equal",
        "batch_size=3",
        "weighter=static",
        "weighter.weights={b: 2, 任务: 3}",
        "early_stopping_patience=null",
    )
    assert {name: task["examples_seen"] for name, task in results["tasks"].items()} == {"a": 5, "b": 2, "任务": 5}
    assert results["cost"]["steps"] == 5
    stages = {line["step"]: line["stage"] for line in read_lines("out/metrics.jsonl") if line["step"] > 0}
    assert stages == {1: "joint", 2: "joint", 3: "weak", 4: "weak", 5: "weak"}
