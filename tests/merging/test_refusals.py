"""What mtl merge refuses, in one line that says what to do."""

import shutil

import pytest

from mtl.cli import main
from mtl.merging.branches import check_alike, read_branches


@pytest.fixture
def refused(tmp_path, capsys):
    """Merges and gives the line; nothing is written."""

    def run(*arguments):
        capsys.readouterr()
        assert main(["merge", *map(str, arguments), "--output", str(tmp_path / "merged")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("mtl: error: ")
        assert not (tmp_path / "merged").exists()
        return error

    return run


def edit(*keys, value):
    """Changes an entry of the checkpoint's state."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def test_what_is_missing(refused, branches, tmp_path, capsys):
    assert "at least two" in refused(branches[0])
    assert "name the folders of at least two" in refused()
    assert "named twice" in refused(branches[0], branches[0])
    assert "no config.yaml" in refused(branches[0], tmp_path)
    assert "must be at least 2" in refused(*branches, "--max-evaluations", 1)
    assert "must be one of mean_loss_ratio" in refused(*branches, "--select", "best")
    assert "Unknown option --weights" in refused(*branches, "--weights", 1)
    assert "reference" in refused(*branches, "--select", "mean_change")
    assert main(["merge", *map(str, branches)]) == 2
    assert "--output: name" in capsys.readouterr().err


def test_an_output_that_is_there_stays(branches, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert main(["merge", *map(str, branches), "--output", str(tmp_path / "mine")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


def test_an_output_that_cannot_be(branches, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["merge", *map(str, branches), "--output", str(tmp_path / "file" / "merged")]) == 2
    assert "Not a directory. Nothing was written" in capsys.readouterr().err


def test_runs_that_have_not_finished(refused, branches, changed):
    unfinished = changed(branches[0], "unfinished", lambda state: None)
    (unfinished / "results.json").unlink()
    assert "has not finished" in refused(branches[1], unfinished)
    within = changed(branches[0], "within", edit("parts", value={}))
    assert "in the middle of a stage" in refused(branches[1], within)
    (within / "checkpoints" / "step-000012" / "state.json").write_text("{}")
    assert "no checkpoint there that verifies" in refused(branches[1], within)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("tasks", "small"), "20 examples, other", "other tasks"),
        (("tasks", "fourth"), "20 examples, other", "other tasks"),
        (("model", "weights"), "other", "other base model"),
        (("config", "adapters.lora_alpha"), 7, "other adapters"),
        (("config", "adapters.lora_r"), 7, "other adapters"),
    ],
)
def test_runs_that_do_not_belong_together(keys, value, words, refused, branches, changed):
    other = changed(branches[1], "other", edit("identity", *keys, value=value))
    assert words in refused(branches[0], other)


def test_dropout_and_seed_may_differ(branches, changed):
    def change(state):
        state["identity"]["config"].update({"adapters.lora_dropout": 0.3, "seed": 5})

    check_alike(read_branches([branches[0], changed(branches[1], "other", change)]))


def test_a_start_that_is_none(refused, branches, first, changed):
    assert "is not what" in refused(*branches, "--start", branches[0])
    other = changed(first, "other", edit("run", "history", value=[{"stage": "another"}]))
    assert "is not what" in refused(*branches, "--start", other)


def test_equal_runs(refused, branches, changed):
    assert "the very same parameters" in refused(branches[0], changed(branches[0], "same", lambda state: None))


def test_data_that_have_changed_since(refused, branches, changed):
    both = [
        changed(branch, name, edit("identity", "tasks", "small", value="other"))
        for branch, name in zip(branches, ("one", "two"), strict=True)
    ]
    assert "now leads to other tasks" in refused(*both)


def test_a_sweep_with_a_failed_job(refused, sweep, tmp_path):
    copy = tmp_path / "sweep"
    shutil.copytree(sweep, copy)
    next(copy.glob("*/results.json")).unlink()
    assert "Finish the sweep" in refused(copy)


def test_the_config_of_a_merge_is_not_trained(first, tmp_path, capsys):
    text = (first / "config.yaml").read_text(encoding="utf-8")
    assert "merged_from: []" in text
    (tmp_path / "config.yaml").write_text(text.replace("merged_from: []", "merged_from: [one, two]"), encoding="utf-8")
    command = ["train", "--config", str(tmp_path / "config.yaml"), f"output_dir={tmp_path / 'again'}"]
    assert main(command) == 2
    assert "merged_from=one,two" in capsys.readouterr().err
