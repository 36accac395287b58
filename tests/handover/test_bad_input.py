"""Mistakes are one line that names the place, with exit code 2, before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest


@pytest.fixture
def copy(trained, tmp_path):
    """A run's folder to break."""

    def make(layout="per_task"):
        return shutil.copytree(trained(layout).folder, tmp_path / "copy")

    return make


VERBS = {
    "export": (),
    "eval": (),
    "predict": ("--input", "rows.jsonl"),
    "chat": (),
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_task(trained, mtl, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    error = mtl(verb, trained("per_task").folder, "--task", "colour", *VERBS[verb], code=2)
    assert "Did you mean colours?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_an_unfinished_run(copy, mtl, verb):
    folder = copy()
    (folder / "results.json").unlink()
    assert "the run has not finished" in mtl(verb, folder, "--task", "sums", *VERBS[verb], code=2)


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_is_no_run(tmp_path, mtl, verb):
    assert "must be the folder of a finished run" in mtl(verb, tmp_path, "--task", "sums", *VERBS[verb], code=2)
    assert "must be the folder of a finished run" in mtl(verb, tmp_path / "no", "--task", "x", *VERBS[verb], code=2)


def test_no_folder_and_unknown_options(mtl, trained):
    assert "must be given, found none" in mtl("eval", code=2)
    assert "must be given, found a b" in mtl("eval", "a", "--task", "x", "b", code=2)
    assert "Unknown option --tsk" in mtl("eval", trained("per_task").folder, "--tsk", "x", code=2)
    assert "invalid int value" in mtl("eval", trained("per_task").folder, "--max-examples", "x", code=2)


def test_an_adapter_that_is_gone_or_does_not_fit(copy, mtl, tmp_path):
    folder = copy()
    shutil.rmtree(folder / "adapters" / "sums")
    assert "there is none" in mtl("export", folder, "--task", "sums", code=2)
    mtl("export", folder, "--task", "picks", "--output", tmp_path / "out")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "can't be put onto the model" in mtl("eval", tmp_path / "out", code=2)


def test_a_base_model_that_is_gone(copy, mtl):
    folder = copy()
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    gone = "".join(
        f"  name_or_path: {folder}/gone\n" if line.startswith("  name_or_path:") else line
        for line in config.splitlines(keepends=True)
    )
    (folder / "config.yaml").write_text(gone, encoding="utf-8")
    for verb in ("export", "eval"):
        assert "gone does not exist" in mtl(verb, folder, "--task", "sums", code=2)


def test_a_choice_of_tasks_is_asked_for(trained, mtl):
    folder = trained("per_task").folder
    assert "--task or --all: one must be given" in mtl("export", folder, code=2)
    assert "not both" in mtl("export", folder, "--all", "--task", "sums", code=2)
    assert "since there are several: colours, sums, picks" in mtl("chat", folder, code=2)


def test_a_trained_model_has_no_adapters(trained, mtl):
    assert "adapters=full" in mtl("export", trained("full").folder, "--all", code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "gguf_ready"], "Did you mean gguf-ready?"),
        (["--format", "merged", "--dtype", "int8"], "must be one of auto, float32"),
        (["--dtype", "float16"], "is for merged weights"),
    ],
)
def test_formats(trained, mtl, options, message):
    assert message in mtl("export", trained("per_task").folder, "--task", "sums", *options, code=2)


def test_an_export_is_no_run_and_may_be_damaged(trained, mtl, tmp_path):
    mtl("export", trained("per_task").folder, "--task", "sums", "--output", tmp_path / "a")
    assert "is an export already" in mtl("export", tmp_path / "a", "--task", "sums", code=2)
    file = tmp_path / "a" / "mtl_export.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for broken in ({**content, "schema": 9}, {**content, "tasks": 3}, {**content, "options": {}}, {}, []):
        file.write_text(json.dumps(broken), encoding="utf-8")
        error = mtl("eval", tmp_path / "a", code=2)
        assert str(file) in error
        assert error.count("\n") == 1


def test_exports_side_by_side_must_go_onto_one_model(trained, mtl, tmp_path):
    folder = trained("per_task").folder
    for name in ("a", "b"):
        mtl("export", folder, "--task", "sums", "--output", tmp_path / name)
    assert "are for the same task" in mtl("eval", tmp_path, code=2)


def test_a_task_of_plain_text_has_no_answers(mtl, train_on, tiny_folder, task_files, tmp_path):
    rows = "".join(json.dumps({"text": f"some text {i}"}) + "\n" for i in range(20))
    (tmp_path / "prose.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        run = train_on(patch, tmp_path, tiny_folder, task_files, [f"tasks.prose.path={tmp_path / 'prose.jsonl'}"])
    assert "exactly as in the run's results.json" in mtl("eval", run.folder, "--task", "prose")
    error = mtl("predict", run.folder, "--task", "prose", "--input", tmp_path / "rows.jsonl", code=2)
    assert "is plain text" in error


def test_evaluation_options(trained, mtl, tmp_path):
    folder = trained("per_task").folder
    assert "must be val or test" in mtl("eval", folder, "--split", "train", code=2)
    assert "must be positive" in mtl("eval", folder, "--max-examples", "0", code=2)
    shown = mtl("eval", folder, "--task", "sums", "--max-examples", "1", "--output", tmp_path / "x.json")
    assert "of other examples than the run's" in shown
    mtl("eval", folder, "--task", "sums", "--split", "val", "--output", tmp_path / "val.json")
    found = json.loads((tmp_path / "val.json").read_text(encoding="utf-8"))["tasks"]["sums"]
    assert found["loss"] == pytest.approx(trained("per_task").results["sums"]["val"]["loss"], rel=1e-5)
