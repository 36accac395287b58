"""Which folders are runs, which runs belong together, what they are called, and what is said of the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml

from mtl.errors import UserError
from mtl.report.compare import compare
from mtl.report.runs import find_runs
from mtl.sweep_folder import SweepRecord, open_sweep, record_failure

CHOICE = {"sentiment": "accuracy"}


@pytest.fixture
def make_folder(make_run, tmp_path):
    """A run in a folder of any name, with these values of dotted keys in its config."""

    def make(name, seed=0, **values):
        made = make_run("mean", seed, folder=tmp_path / "made", tasks=CHOICE, num_steps=2)
        folder = tmp_path / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, folder)
        path = folder / "config.yaml"
        config = yaml.safe_load(path.read_text())
        for key, value in values.items():
            group = config
            *groups, last = key.split(".")
            for part in groups:
                group = group.setdefault(part, {})
            group[last] = value
        path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        return folder

    return make


def names(*paths):
    return {str(run.folder.name): run.strategy for run in find_runs(paths).runs}


def strategies(*paths):
    return {run.strategy: run.seed for run in find_runs(paths).runs}


def test_a_sweep_names_its_strategies(make_run, tmp_path):
    for name in ("pcgrad", "temperature=2.0,lr=0.001"):
        for seed in (0, 1):
            make_run(name, seed, tasks=CHOICE)
    found = find_runs([tmp_path])
    assert [(run.strategy, run.seed) for run in found.runs] == [
        ("pcgrad", 0),
        ("pcgrad", 1),
        ("temperature=2.0,lr=0.001", 0),
        ("temperature=2.0,lr=0.001", 1),
    ]
    assert (found.notes, found.failures) == ([], {})


def test_a_run_by_itself(make_run):
    folder = make_run("pcgrad", 3, tasks=CHOICE)
    (run,) = find_runs([folder]).runs
    assert (run.folder, run.strategy, run.seed, run.only_task) == (folder, "pcgrad", 3, None)
    assert run.metrics_file == folder / "metrics.jsonl"
    assert len(run.predictions("sentiment")) == 20
    with pytest.raises(UserError, match=r"predictions/inflect\.jsonl: must be a file, and there is none"):
        run.predictions("inflect")


@pytest.mark.parametrize("place", ["seed=1,pcgrad", "pcgrad,seed=1", "pcgrad"])
def test_the_seed_is_no_part_of_the_name(make_folder, place):
    assert list(strategies(make_folder(place))) == ["pcgrad"]


def test_folders_of_times_are_named_by_what_differs(make_folder, tmp_path):
    make_folder("outputs/2026-11-24/10-11-12", **{"surgery._target_": "mtl.surgery.PCGrad"})
    make_folder("outputs/2026-11-24/10-11-12-1", 1, **{"surgery._target_": "mtl.surgery.PCGrad"})
    make_folder("outputs/2026-11-24/10-15-00", **{"sampler.temperature": 5.0})
    assert names(tmp_path / "outputs") == {
        "10-11-12": "PCGrad",
        "10-11-12-1": "PCGrad",
        "10-15-00": "temperature=5.0,mean",
    }


def test_nothing_differs_from_a_run_by_itself(make_folder):
    assert names(make_folder("10-11-12")) == {"10-11-12": "run"}


def test_single_task_runs_do_not_lengthen_the_names(make_folder, tmp_path):
    make_folder("runs/10-11-12", **{"surgery._target_": "PCGrad"})
    make_folder("runs/10-15-00")
    make_folder("runs/10-16-00", only_task="sentiment", **{"sampler._target_": "Equal"})
    assert set(names(tmp_path / "runs").values()) == {"PCGrad", "mean", "run"}


@pytest.mark.parametrize("num_sweeps", [2, 3])
def test_equal_folders_with_other_configs_are_other_strategies(make_folder, tmp_path, num_sweeps):
    for number in range(num_sweeps):
        for seed in (0, 1):
            make_folder(f"sweep_{number}/pcgrad,seed={seed}", seed, max_steps=10 * (number + 1))
    found = find_runs([tmp_path])
    assert [run.strategy for run in found.runs] == [
        f"pcgrad,max_steps={10 * (number + 1)}" for number in range(num_sweeps) for _ in (0, 1)
    ]
    assert not found.notes


def test_names_that_would_be_the_same_are_numbered(make_folder, tmp_path):
    """``size`` of the sampler and of the weighter: two strategies, never one of two seeds."""
    make_folder("10-11-12", 0, **{"sampler.size": 5})
    make_folder("10-15-00", 1, **{"weighter.size": 5})
    assert strategies(tmp_path) == {"size=5": 0, "size=5 (2)": 1}


def test_another_model_is_another_strategy(make_folder, tmp_path):
    make_folder("a/equal,seed=0", 0, **{"model.name_or_path": "small"})
    make_folder("b/equal,seed=1", 1, **{"model.name_or_path": "large"})
    assert strategies(tmp_path) == {"equal,name_or_path=small": 0, "equal,name_or_path=large": 1}


def test_what_changes_no_number_makes_no_strategy(make_folder, tmp_path):
    make_folder("a/equal,seed=0", 0, output_dir="x", micro_batch_tokens=5, **{"sweep.over": {}})
    make_folder("b/equal,seed=1", 1, output_dir="y", micro_batch_tokens=9)
    assert [run.strategy for run in find_runs([tmp_path]).runs] == ["equal", "equal"]


def test_other_data_are_another_strategy(make_folder, tmp_path):
    make_folder("sweep/tasks.a.path=raw,seed=0", 0, **{"tasks.a": {"path": "raw"}})
    make_folder("sweep/tasks.a.path=clean,seed=0", 0, **{"tasks.a": {"path": "clean"}})
    found = find_runs([tmp_path / "sweep"])
    assert {run.strategy for run in found.runs} == {"tasks.a.path=raw", "tasks.a.path=clean"}
    assert not found.notes


def test_a_sweep_over_what_changes_no_number_compares_its_cost(make_folder, tmp_path):
    make_folder("packing=true,seed=0", 0, packing=True)
    make_folder("packing=false,seed=0", 0, packing=False)
    assert strategies(tmp_path) == {"packing=true": 0, "packing=false": 0}


def test_names_of_any_script(make_folder, tmp_path):
    """The composed and the decomposed form of a letter are one."""
    make_folder(f"a/{unicodedata.normalize('NFC', 'naïve')},seed=0", 0)
    make_folder(f"b/{unicodedata.normalize('NFD', 'naïve')},seed=1", 1)
    make_folder("a/梯度手术 😀,seed=0", 0, max_steps=7)
    make_folder("a/جراحة,seed=0", 0, max_steps=8)
    found = {run.strategy for run in find_runs([tmp_path]).runs}
    assert found == {unicodedata.normalize("NFC", "naïve"), "梯度手术 😀", "جراحة"}


def test_of_a_config_and_seed_run_twice_the_newest_counts(make_folder, tmp_path):
    new, old = make_folder("a/pcgrad,seed=0"), make_folder("b/pcgrad,seed=0")
    os.utime(old / "results.json", (1e9, 1e9))
    for paths in ([new, old], [old, new], [tmp_path]):
        found = find_runs(paths)
        assert [run.folder for run in found.runs] == [new]
        assert found.notes == [f"left out: {old}: {new} is a newer run of the same config and seed"]


def test_a_folder_named_twice_counts_once(make_folder, tmp_path):
    folder = make_folder("runs/pcgrad,seed=0")
    for paths in ([folder, folder], [tmp_path / "runs", folder], [folder, tmp_path / "runs"]):
        found = find_runs(paths)
        assert ([run.folder for run in found.runs], found.notes) == ([folder], [])


def test_a_run_without_results_is_marked(make_run, tmp_path):
    make_run("done", tasks=CHOICE)
    unfinished = make_run("cut", tasks=CHOICE)
    (unfinished / "results.json").unlink()
    found = find_runs([tmp_path / "runs"])
    assert [run.strategy for run in found.runs] == ["done"]
    assert found.notes == [f"left out: {unfinished}: has not finished (there is no results.json)"]
    assert compare(found).notes[0] == found.notes[0]
    (unfinished / "metrics.jsonl").unlink()  # it had only begun
    assert find_runs([tmp_path / "runs"]).notes == found.notes


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("results.json", "{", "must be JSON"),
        ("results.json", '{"schema": 99}', "schema must be 1, found 99"),
        ("config.yaml", "a: [", "must be the config of the run"),
        ("config.yaml", "- 1", "must hold a mapping, found list"),
        ("config.yaml", "only_task: [a]", r"only_task must be the name of a task or null, found \['a'\]"),
        ("config.yaml", None, "must be the config of the run, found: .*No such file"),
    ],
)
def test_a_damaged_run_beside_a_good_one_is_marked(make_run, tmp_path, file, content, reason):
    make_run("good", tasks=CHOICE)
    path = make_run("damaged", tasks=CHOICE) / file
    path.write_text(content) if content else path.unlink()
    found = find_runs([tmp_path / "runs"])
    assert [run.strategy for run in found.runs] == ["good"]
    (note,) = found.notes
    assert note.startswith(f"left out: {path}: ")
    assert "\n" not in note
    with pytest.raises(UserError, match=f"^No run can be read. left out: .*{reason}"):
        find_runs([path.parent])


def test_a_seed_below_zero_is_marked(make_run, tmp_path):
    make_run("good", tasks=CHOICE)
    damaged = make_run("damaged", -1, tasks=CHOICE)
    assert find_runs([tmp_path / "runs"]).notes == [
        f"left out: {damaged / 'results.json'}: seed must not be negative, found -1."
    ]


def test_jobs_of_a_sweep(make_run, tmp_path):
    sweep = tmp_path / "runs"
    jobs = ["rlw,seed=0", "equal,seed=0", "broken,seed=0", "killed,seed=0", "later,seed=0"]
    open_sweep(sweep, SweepRecord([], None, jobs), resume=False)
    make_run("equal", tasks=CHOICE)
    make_run("rlw", tasks=CHOICE)
    record_failure(sweep / "broken,seed=0", 1, "learning_rate=-1.0: must be above 0. Correct the value.")
    record_failure(sweep / "killed,seed=0", 137, "killed")
    found = find_runs([sweep])
    assert [run.strategy for run in found.runs] == ["rlw", "equal"]  # in the order of the sweep
    assert found.failures == {"broken,seed=0": "learning_rate=-1.0: must be above 0. Correct the value."}
    assert found.notes == [
        f"left out: {sweep}/killed,seed=0: interrupted",
        f"left out: {sweep}/later,seed=0: not started",
    ]
    comparison = compare(found)
    assert comparison.failures == found.failures
    assert comparison.notes[:2] == found.notes


def test_failures_of_two_sweeps_are_both_named(make_run, tmp_path):
    for number in (1, 2):
        sweep = tmp_path / f"sweep_{number}"
        make_run("equal", number, folder=sweep, tasks=CHOICE)
        open_sweep(sweep, SweepRecord([], None, ["equal,seed=" + str(number), "broken"]), resume=False)
        record_failure(sweep / "broken", 1, f"error {number}")
    found = find_runs([tmp_path])
    assert found.failures == {"broken": "error 1", f"{tmp_path}/sweep_2/broken": "error 2"}
    comparison = compare(find_runs([tmp_path / "sweep_1"]), find_runs([tmp_path / "sweep_2"]))
    assert comparison.failures == {"broken": "error 2"}


def test_folders_without_finished_runs_are_refused(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    good = make_run(tasks=CHOICE)
    message = rf"^{tmp_path}/empty: holds no finished run \(results\.json\)\. Let the training end, or name another\.$"
    with pytest.raises(UserError, match=message):
        find_runs([good, tmp_path / "empty"])
    with pytest.raises(UserError, match=r"/no: must be the folder of a run, of a sweep, .*there is none\.$"):
        find_runs([good, tmp_path / "no"])


def test_a_sweep_whose_jobs_all_failed_is_refused_with_an_error(make_run, tmp_path):
    for name in ("first", "second"):
        open_sweep(tmp_path / name, SweepRecord([], None, [f"{name}_job"]), resume=False)
        record_failure(tmp_path / name / f"{name}_job", 1, f"{name}: must be above 0.")
    make_run("good", folder=tmp_path / "first", tasks=CHOICE)
    with pytest.raises(UserError, match=r"second: holds no .*\. second_job failed: second: must be above 0\. Let the"):
        find_runs([tmp_path / "first", tmp_path / "second"])
    (tmp_path / "second" / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"second/sweep\.json: must be what a sweep has written"):
        find_runs([tmp_path / "second"])


def test_predictions_that_lack_something_are_refused(make_run):
    folder = make_run(tasks=CHOICE)
    path = folder / "predictions" / "sentiment.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[2]["score"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = find_runs([folder])
    with pytest.raises(UserError, match=rf"^{path}:3: score must be a number from 0 to 1, found nothing; run the "):
        compare(found)


def test_reading_and_comparing_imports_no_torch(make_run):
    """Nor what a chart needs."""
    folder = make_run(tasks={"sentiment": "accuracy", "inflect": "exact_match"})
    script = (
        "import sys; from pathlib import Path; from mtl.report.compare import compare; "
        "from mtl.report.runs import find_runs; compare(find_runs([Path(sys.argv[1])])); "
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'sklearn') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert finished.stdout == "[]\n"
