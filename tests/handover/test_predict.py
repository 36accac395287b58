"""Answers to a file of rows: in order, as the run's evaluation gives them, with or without the right answers."""

from __future__ import annotations

import json
import shutil

import pytest

from mtl.handover.deployment import open_deployment


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def predictions(trained):
    """What the run has left of a task's test examples."""

    def read(name):
        file = trained("shared_and_per_task").folder / "predictions" / f"{name}.jsonl"
        return lines(file.read_text(encoding="utf-8"))

    return read


@pytest.mark.parametrize("task", ["colours", "sums", "picks"])
@pytest.mark.parametrize("with_references", [True, False])
def test_answers_are_those_of_the_run(trained, mtl, predictions, tmp_path, task, with_references):
    run = trained("shared_and_per_task")
    expected = predictions(task)
    rows = [{"prompt": item["prompt"]} for item in expected]
    for row, item in zip(rows, expected, strict=True):
        row |= {"options": ["a", "b", "c"]} if task == "picks" else {}
        row |= {"completion": item["reference"]} if with_references else {}
    mtl(
        "predict", run.folder, "--task", task, "--input", write(tmp_path / "in.jsonl", rows), "--output", tmp_path / "o"
    )
    found = lines((tmp_path / "o").read_text(encoding="utf-8"))
    for key in ("prompt", "prediction", "answer"):
        assert [item[key] for item in found] == [item[key] for item in expected]
    if with_references:
        assert [item["score"] for item in found] == [item["score"] for item in expected]
    else:
        assert all("score" not in item and "reference" not in item for item in found)
    assert [item["location"] for item in found] == [f"in.jsonl:{number + 1}" for number in range(len(rows))]


def test_every_format_with_and_without_an_answer(trained, mtl, tmp_path):
    run = trained("shared_and_per_task")
    question = "3 + 4?"
    alike = [
        {"prompt": question},
        {"prompt": question, "completion": "7"},
        {"messages": [{"role": "user", "content": question}]},
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "7"}]},
        {"conversations": [{"from": "human", "value": question}]},
        {"instruction": question},
        {"instruction": question, "output": "7"},
    ]
    found = lines(mtl("predict", run.folder, "--task", "sums", "--input", write(tmp_path / "in.jsonl", alike)))
    assert len({item["prediction"] for item in found}) == 1
    assert ["score" in item for item in found] == [False, True, False, True, False, False, True]
    (tmp_path / "in.csv").write_text('prompt,completion\n"3 + 4?",\n"3 + 4?",7\n', encoding="utf-8")
    from_csv = lines(mtl("predict", run.folder, "--task", "sums", "--input", tmp_path / "in.csv"))
    assert ["score" in item for item in from_csv] == [False, True]
    assert {item["prediction"] for item in from_csv} == {item["prediction"] for item in found}


def test_rows_keep_their_order_over_several_parts(trained, mtl, tmp_path, monkeypatch):
    run = trained("shared_and_per_task")
    rows = [{"prompt": f"{'x' * (7 * i % 13)} {i}"} for i in range(23)]
    whole = lines(mtl("predict", run.folder, "--task", "colours", "--input", write(tmp_path / "in.jsonl", rows)))
    monkeypatch.setattr("mtl.handover.predicting.ROWS_AT_ONCE", 5)
    parts = lines(mtl("predict", run.folder, "--task", "colours", "--input", tmp_path / "in.jsonl"))
    assert [item["prompt"] for item in parts] == [row["prompt"] for row in rows]
    assert [item["answer"] for item in parts] == [item["answer"] for item in whole]
    for item, other in zip(parts, whole, strict=True):
        assert item["log_likelihoods"] == pytest.approx(other["log_likelihoods"], rel=1e-5)
        assert max(item["log_likelihoods"], key=item["log_likelihoods"].get) == item["answer"]


def test_an_export_answers_as_its_run(trained, mtl, tmp_path):
    run = trained("experts")
    mtl("export", run.folder, "--task", "sums", "--output", tmp_path / "out")
    rows = write(tmp_path / "in.jsonl", [{"prompt": f"{i} + 1?"} for i in range(6)])
    assert mtl("predict", tmp_path / "out", "--input", rows) == (
        mtl("predict", run.folder, "--task", "sums", "--input", rows)
    )


def test_answers_of_several_lines_are_not_cut(trained, mtl, tmp_path, monkeypatch):
    """Where the run has seen such answers, which an export remembers."""
    folder = shutil.copytree(trained("per_task").folder, tmp_path / "run")
    file = folder / "predictions" / "picks.jsonl"
    [*others, last] = lines(file.read_text(encoding="utf-8"))
    write(file, [*others, {**last, "reference": "a\nb"}])
    for name in ("sums", "picks"):
        mtl("export", folder, "--task", name, "--output", tmp_path / name)
        assert [task.multiline for task in open_deployment(tmp_path / name).tasks.values()] == [name == "picks"]
    seen = []
    monkeypatch.setattr("mtl.handover.predicting.extract_answer", lambda text, **how: seen.append(how) or text)
    rows = write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    for name in ("sums", "picks"):
        mtl("predict", tmp_path / name, "--input", rows)
    assert [how["multiline"] for how in seen] == [False, True]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("sums", '{"prompt": "x"}\n{"question": "y"}\n', 'in.jsonl:2 has no "messages"'),
        ("sums", '{"prompt": "x"}\nnot json\n', "in.jsonl:2 is not JSON"),
        ("sums", '{"prompt": 3}\n', 'in.jsonl:1 has "prompt" that is no text'),
        ("sums", '{"messages": []}\n', 'in.jsonl:1 has "messages" that are no list'),
        ("sums", '{"messages": [{"role": "bot", "content": "x"}]}\n', "in.jsonl:1 has the role 'bot'"),
        ("sums", "\n", "has no rows"),
        ("colours", '{"prompt": "x", "completion": "blue"}\n', "is none of tasks.colours.labels"),
        ("picks", '{"prompt": "x", "options": ["a", "b"]}\n{"prompt": "x"}\n', 'in.jsonl:2 has no "options"'),
        ("sums", json.dumps({"prompt": "x" * 600}) + "\n", "the model has 512 positions"),
    ],
)
def test_rows_that_can_not_be_answered(trained, mtl, tmp_path, task, content, message):
    (tmp_path / "in.jsonl").write_text(content, encoding="utf-8")
    command = ("predict", trained("shared_and_per_task").folder, "--task", task, "--input", tmp_path / "in.jsonl")
    error = mtl(*command, "--output", tmp_path / "out", code=2)
    assert message in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
