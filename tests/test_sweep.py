"""Sweeps: jobs by name, what is finished stays finished, what failed is named, searches go by validation data."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtl.cli import main
from mtl.composition import composed, job_name, settings_of
from mtl.errors import UserError
from mtl.report.objective import objective
from mtl.report.runs import find_runs
from mtl.sweep import parsed, ranges, taken_up, values_of
from mtl.sweep_folder import SweepRecord, jobs_of, open_sweep, read_sweep, record_failure, unfinished

ROOT = Path(__file__).parents[1]
QUIET = "hydra/job_logging=disabled"  # otherwise Hydra leaves a log file open
# Every step of every run leaves a line; the third class kills its process in the third step, once.
OWN_WEIGHTERS = """
import os, signal
from pathlib import Path
from mtl.weighters import Equal

class One(Equal):
    def weights(self, feedback):
        with open("steps.txt", "a") as file:
            print(type(self).__name__, file=file)
        return super().weights(feedback)

class Two(One): pass

class Three(One):
    def update(self, feedback):
        if feedback.step == 2 and len(feedback.tasks) and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

class Four(One):
    def __init__(self, num_tasks):
        raise ValueError("num_tasks: must please me, found something else; give up")

class Five(One): pass

class Six(One): pass
"""


@pytest.fixture
def overrides(tmp_path, monkeypatch, tiny_folder, make_task):
    """A run of four steps in an empty folder."""
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    paths = {
        name: make_task(name, [{"prompt": f"{name} {i}", "completion": "ab"[i % 2]} for i in range(size)])
        for name, size in {"one": 20, "two": 50}.items()
    }
    return [
        *(f"model.name_or_path={tiny_folder}", "tasks=none", *(f"tasks.{name}.path={paths[name]}" for name in paths)),
        *("max_steps=4", "batch_size=4", "max_eval_examples=2", "max_test_examples=3", "evals_per_stage=2"),
        *("adapters=shared", "adapters.lora_r=2", "max_length=64"),
        *(f"tasks.{name}.max_new_tokens=2" for name in paths),
    ]


def command(*arguments, code=0):
    """``mtl`` in a process of its own; gives standard output and standard error."""
    own = str(Path.cwd().parent / "own")
    finished = subprocess.run(
        [sys.executable, "-m", "mtl.cli", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), own]), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished.stdout, finished.stderr


@pytest.mark.parametrize(
    ("varied", "name"),
    [
        ("seed=1,strategy=pcgrad", "pcgrad,seed=1"),
        ("strategy=pcgrad", "pcgrad"),
        ("learning_rate=0.001,seed=1,strategy=mgda,weighter=rlw", "mgda,learning_rate=0.001,seed=1,weighter=rlw"),
        ("only_task=g2p,seed=0", "only_task=g2p,seed=0"),
        ("own_strategy=x,seed=0", "own_strategy=x,seed=0"),
        ("model.name_or_path=/a/b,seed=0", "model.name_or_path=_a_b,seed=0"),
    ],
)
def test_the_name_of_a_job(varied, name):
    assert job_name(varied) == name


def test_long_names_fit_a_folder_and_stay_apart():
    """As those of a search over the weights of many tasks are, whose first digits may agree."""
    weights = ["".join(f",weighter.weights.情感 {i}=0.{'1' * 15}{last}" for i in range(20)) for last in "23"]
    names = [job_name(f"seed={seed}{own}") for own in weights for seed in (0, 1)]
    assert len(set(names)) == 4
    assert all(len(name.encode()) < 250 for name in names)
    assert [name.rpartition(",seed=")[2] for name in names] == ["0", "1", "0", "1"]
    assert len({name.rpartition(",seed=")[0] for name in names}) == 2  # by which the report tells strategies


def test_the_values_of_an_override():
    texts = ["a=1,2", "b=range(1,4)", "c=int(interval(1,5))", "d=tag(log,interval(0.5,2.0))", "e=[1,2]", "f='x,y'"]
    assert [values_of(item) for item in parsed(texts)] == [
        ["a=1", "a=2"],
        ["b=1", "b=2", "b=3"],
        ["c=1", "c=5"],
        ["d=0.5", "d=2.0"],
        ["e=[1,2]"],
        ["f='x,y'"],
    ]


def test_ranges_name_the_tasks():
    over = {"only_task": "{tasks}", "w.{task}": "interval(0,1)", "seed": "0,1"}
    assert list(ranges(over, ["one", "two"])) == [
        ("only_task", "one,two"),
        ("w.one", "interval(0,1)"),
        ("w.two", "interval(0,1)"),
        ("seed", "0,1"),
    ]


def test_a_sweep_that_was_killed_goes_on_with_what_is_missing(overrides, own_module):
    """Six jobs: the third kills the process in its third step, the fourth has a broken config."""
    own_module("own_weighters", OWN_WEIGHTERS)
    names = ["One", "Two", "Three", "Four", "Five", "Six"]
    classes = ",".join(f"own_weighters.{name}" for name in names)
    command(
        *("train", "-m", *overrides, f"weighter._target_={classes}", "sweep.dir=out", "conflict_steps=3"),
        code=-signal.SIGKILL,
    )
    statuses = ["finished", "finished", "interrupted", "not started", "not started", "not started"]
    assert [job.status for job in jobs_of(Path("out"))] == statuses
    jobs = [f"weighter._target_=own_weighters.{name}" for name in names]
    assert [job.name for job in jobs_of(Path("out"))] == jobs
    before = {name: Path("out", name, "metrics.jsonl").read_bytes() for name in jobs[:2]}

    told, err = command("train", "-m", "sweep.dir=out", "sweep.resume=true", code=2)
    statuses = ["finished", "finished", "finished", "failed", "finished", "finished"]
    assert [job.status for job in jobs_of(Path("out"))] == statuses
    assert f"{jobs[0]}: has finished before" in told
    reason = "weighter.num_tasks: must please me, found something else; give up"
    assert err.splitlines() == [
        f"mtl: error: {reason}",
        "1 of 6 jobs have not finished:",
        f"  {jobs[3]}{'':{len(jobs[2]) - len(jobs[3])}}  failed: {reason}",
        "To finish them: mtl train -m sweep.dir=out sweep.resume=true",
    ]
    # Four steps each; of the killed run the third step again, which it had not finished.
    assert Path("steps.txt").read_text().split() == [
        name for name, steps in (("One", 4), ("Two", 4), ("Three", 5), ("Five", 4), ("Six", 4)) for _ in range(steps)
    ]
    assert before == {name: Path("out", name, "metrics.jsonl").read_bytes() for name in jobs[:2]}
    whole = [Path("out", name, "metrics.jsonl").read_text() for name in (jobs[0], jobs[2])]
    assert whole[0] == whole[1], "a run that was killed must leave what it would have left"

    assert list(Path("out/tensorboard", jobs[0]).glob("events*")) == list(Path("out/tensorboard", jobs[0]).iterdir())
    shown, _ = command("report", "out")
    assert f"failed: {jobs[3]}: {reason}" in shown
    for name in ("One", "Two", "Three", "Five", "Six"):
        assert name in shown
    assert "left out" not in shown


def test_a_sweep_refuses_a_folder_that_holds_another(overrides, capsys):
    given = ["train", "-m", *overrides, QUIET, "sweep.dir=out"]
    assert main([*given, "max_steps=1,2"]) == 0, capsys.readouterr().err
    assert main([*given, "max_steps=1,2"]) == 2
    assert "sweep.dir=out: holds a sweep already. Finish it with sweep.resume=true" in capsys.readouterr().err
    assert main([*given, "max_steps=1,2", "seed=7", "sweep.resume=true"]) == 2
    err = capsys.readouterr().err
    assert "out/max_steps=1: holds the results of another config: seed was 0, is 7." in err
    assert "seed=7" not in read_sweep(Path("out")).overrides
    assert main([*given, "max_steps=1,3", "sweep.resume=true"]) == 0
    assert {job.name for job in jobs_of(Path("out"))} == {"max_steps=1", "max_steps=2", "max_steps=3"}


def test_resuming_keeps_what_the_sweep_was_asked_for(tmp_path):
    """Also where the command adds something; the last of a key counts."""
    open_sweep(tmp_path / "out", SweepRecord(["strategy=equal,pcgrad", "seed=0"], "own", []), resume=False)
    for true in ("true", "True"):
        own = [f"sweep.dir='{tmp_path}/out'", f"sweep.resume={true}", "seed=0,1"]
        assert taken_up(own, None) == (["strategy=equal,pcgrad", "seed=0", *own], "own")
    for own in (["seed=1"], ["sweep.dir=out"], ["sweep.dir=out", "sweep.resume=false"], ["sweep.resume=true"]):
        assert taken_up(own, "other") == (own, "other")


def test_more_seeds_in_a_sweep_that_is_resumed(overrides, capsys):
    """All are tested on the same examples, though their tasks have no test set of their own."""
    assert main(["train", "-m", *overrides, QUIET, "sweep.dir=out", "max_steps=1", "seed=0,1"]) == 0
    assert main(["train", "-m", QUIET, "sweep.dir=out", "sweep.resume=true", "seed=0,1,2"]) == 0, capsys.readouterr()
    assert capsys.readouterr().out.count(": has finished before") == 2
    assert [job.name for job in jobs_of(Path("out"))] == ["seed=0", "seed=1", "seed=2"]
    assert len(list(Path("..", "cache", "tokens").iterdir())) == 2  # those of each task, once
    assert main(["report", "out"]) == 0, capsys.readouterr().err
    assert read_sweep(Path("out")).overrides[-1] == "seed=0,1,2"


def test_a_sweep_over_data(overrides, capsys):
    """Paths have slashes, and other data are another strategy."""
    path = next(text.partition("=")[2] for text in overrides if text.startswith("tasks.one.path="))
    Path("data").mkdir()
    for name in ("clean", "raw"):
        shutil.copy(path, f"data/{name}.jsonl")
    versions = "tasks.one.path=data/clean.jsonl,data/raw.jsonl"
    assert main(["train", "-m", *overrides, QUIET, "sweep.dir=out", "max_steps=1", versions]) == 0
    names = ["tasks.one.path=data_clean.jsonl", "tasks.one.path=data_raw.jsonl"]
    assert [(job.name, job.status) for job in jobs_of(Path("out"))] == [(name, "finished") for name in names]
    assert main(["report", "out"]) == 0, capsys.readouterr().err
    assert "left out" not in capsys.readouterr().out
    assert [run.strategy for run in find_runs([Path("out")]).runs] == names


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["output_dir=x"], "output_dir=x: the jobs of a sweep have folders of their own. Set sweep.dir=<folder>."),
        (["sweep.resume=true,false"], "sweep.resume=true,false: must be one value for the whole sweep."),
        (["sweep.resume=true"], "sweep.resume=true: needs the folder of the sweep to finish."),
        (["sweep.resume=true", "sweep.dir=none"], "sweep.dir=none: holds no sweep (there is no sweep.json)."),
        (["sweep.objective=score"], "sweep.objective=score: must be one of mean_loss_ratio, worst_loss_ratio"),
        (["sweep.objective=mean_change"], "sweep.objective=mean_change: compares with single-task runs."),
        (
            ["sweep=optuna", "learning_rate=0.1,1", "sweep.objective=mean_change", "sweep.reference=nowhere"],
            "sweep.reference=nowhere: holds no finished run. Give the folder of the single-task runs.",
        ),
        (
            ["sweep=optuna", "seed=0,1"],
            "seed=0,1: a search would find the luckiest seed. Give one, and compare what it",
        ),
        (["only_task=g2q", "sweep.dir=x"], "only_task=g2q: must be one of the tasks, sentiment, sarcasm"),
        (["only_budget=half", "only_task=g2p", "sweep.dir=x"], "only_budget=half: must be examples or steps."),
    ],
)
def test_mistakes_of_a_sweep(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", QUIET, *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"mtl: error: {expected}"), line


@pytest.mark.parametrize(("name", "key"), [("compare", "strategy"), ("single_task", "only_task")])
def test_a_sweep_by_a_command_without_m(name, key, capsys, tmp_path, monkeypatch):
    """It would train a single run of something else."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"experiment={name}"]) == 2
    assert f"sweep.over: would vary {key} over the jobs of a sweep, and this is a single run. Add -m." in (
        capsys.readouterr().err
    )


def test_the_budget_of_a_single_task(tmp_path):
    def steps(*overrides):
        settings = settings_of(composed(["experiment=single_task", "only_task=g2p", *overrides]), tmp_path)
        assert [task.name for task in settings.tasks] == ["g2p"]
        return [stage.num_steps(1600, 16) for stage in settings.stages]

    assert steps("max_steps=60") == [8]  # 60 of 8 tasks
    assert steps("max_steps=60", "only_budget=steps") == [60]
    assert steps("num_epochs=2") == [200]  # of its own examples


def test_single_task_runs_are_one_for_each_task(overrides, capsys):
    assert main(["train", "-m", *overrides, QUIET, "experiment=single_task", "sweep.dir=out"]) == 0, capsys.readouterr()
    for name in ("one", "two"):
        results = json.loads(Path(f"out/only_task={name}/results.json").read_text())
        assert list(results["tasks"]) == [name]
        assert results["cost"]["steps"] == 2


def test_a_search_finds_the_same_trials_again(overrides, own_module):
    own_module("own_weighters", OWN_WEIGHTERS)
    given = ["train", "-m", *overrides, "sweep=optuna", "sweep.dir=out", "weighter._target_=own_weighters.One"]
    given += ["learning_rate=tag(log,interval(1e-4,1e-1))", "hydra.sweeper.n_trials=3"]
    command(*given)
    jobs = jobs_of(Path("out"))
    assert [job.status for job in jobs] == ["finished"] * 3
    trained = Path("steps.txt").read_text()
    told, _ = command("train", "-m", "sweep.dir=out", "sweep.resume=true")
    assert jobs_of(Path("out")) == jobs
    assert Path("steps.txt").read_text() == trained
    best = (Path("out") / "optimization_results.yaml").read_text()
    values = [objective(Path("out", job.name), "mean_loss_ratio", None) for job in jobs]
    assert f"best_value: {max(values)}" in best
    rate = jobs[values.index(max(values))].name.partition("learning_rate=")[2]
    assert f"Best mean_loss_ratio, {max(values):.4g}: learning_rate={rate}\n" in told


def test_static_weights_are_searched_for_every_task(overrides):
    command(
        *("train", "-m", *overrides, "experiment=tuned_static", "sweep.dir=out", "max_steps=1"),
        "hydra.sweeper.n_trials=2",
    )
    configs = [path.read_text() for path in Path("out").glob("*/config.yaml")]
    assert len(configs) == 2
    for config in configs:
        assert "Static" in config
        assert "one: " in config.partition("weights:")[2]
        assert "two: " in config.partition("weights:")[2]


def test_a_search_in_which_all_fails(overrides):
    given = ["train", "-m", *overrides, "sweep=optuna", "sweep.dir=out", "batch_size=-1", "learning_rate=1e-3,1e-4"]
    _, err = command(*given, "hydra.sweeper.n_trials=2", code=2)
    assert "mtl: error: The search has found nothing: no trial has a finite objective." in err.splitlines()
    assert "jobs have not finished:" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_search_without_what_it_goes_by_ends_at_once(overrides):
    given = ["train", "-m", *overrides, "sweep=optuna", "sweep.dir=out", "eval_scores=false", "max_steps=1"]
    _, err = command(*given, "learning_rate=1e-3,1e-4", "sweep.objective=mean_score", code=2)
    assert "has no validation score of one, which sweep.objective needs. Run it with eval_scores=true." in err
    assert len(jobs_of(Path("out"))) == 1


@pytest.mark.slow
def test_jobs_side_by_side(overrides):
    command("train", "-m", *overrides, "launch=joblib", "seed=0,1", "learning_rate=1e-3,-1", "sweep.dir=out", code=2)
    statuses = {job.name: job.status for job in jobs_of(Path("out"))}
    assert statuses == {
        f"learning_rate={rate},seed={seed}": status
        for rate, status in (("0.001", "finished"), ("-1", "failed"))
        for seed in (0, 1)
    }


def write_run(folder, losses, scores):
    """What an objective reads of a run."""
    folder.mkdir(parents=True)
    evaluations = [{"step": step, "eval": {name: {"loss": loss} for name, loss in row.items()}} for step, row in losses]
    lines = [json.dumps(record) for record in [*evaluations[:1], {"step": 1, "loss": {}}, *evaluations[1:]]]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    tasks = {
        name: {
            "metric": "accuracy",
            "base": {"accuracy": 0.1, "loss": 9.0},
            "val": {"loss": 1.0} | ({} if score is None else {"accuracy": score}),
            "test": {"accuracy": 0.99, "loss": 1.0, "num_examples": 3},
            "examples_seen": 1,
            "epochs_seen": 1.0,
            "target_tokens_seen": 1,
        }
        for name, score in scores.items()
    }
    cost = dict.fromkeys(("steps", "tokens", "target_tokens", "seconds"), 1)
    content = {"schema": 1, "strategy": {}, "seed": 0, "model": "m", "tasks": tasks}
    content["cost"] = {**cost, "tokens_per_second": None, "peak_memory_bytes": None}
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def test_objectives(tmp_path):
    losses = [(0, {"a": 4.0, "b": 2.0}), (2, {"a": 3.0, "b": 9.0}), (4, {"a": 1.0, "b": 1.5})]
    run = write_run(tmp_path / "run", losses, {"a": 0.6, "b": 0.02})
    reference = str(write_run(tmp_path / "single", losses, {"a": 0.5, "b": 0.03}))
    expected = {
        "mean_loss_ratio": -(0.25 + 0.75) / 2,
        "worst_loss_ratio": -0.75,
        "mean_score": 0.31,
        "worst_score": 0.02,
        "mean_change": (0.2 - 0.2) / 2,  # .01 less of at least .05
        "worst_change": -0.2,
    }
    for name, value in expected.items():
        assert objective(run, name, reference) == pytest.approx(value, abs=1e-12), name


def test_an_objective_that_is_not_finite(tmp_path):
    """Whichever task it is that diverged."""
    for number, losses in enumerate([{"a": None, "b": 1.0}, {"a": 1.0, "b": None}]):
        run = write_run(tmp_path / str(number), [(0, {"a": 4.0, "b": 2.0}), (4, losses)], {"a": 0.5, "b": 0.5})
        for name in ("mean_loss_ratio", "worst_loss_ratio"):
            assert math.isnan(objective(run, name, None))


def test_objectives_that_lack_something(tmp_path):
    losses = [(0, {"a": 4.0}), (4, {"a": 1.0})]
    run = write_run(tmp_path / "run", losses, {"a": None})
    with pytest.raises(UserError, match="has no validation score of a"):
        objective(run, "mean_score", None)
    scored = write_run(tmp_path / "scored", losses, {"a": 0.5})
    other = write_run(tmp_path / "other", losses, {"b": 0.5})
    with pytest.raises(UserError, match="must have a run of each task, and has none of a"):
        objective(scored, "mean_change", str(other))


def test_what_became_of_jobs(tmp_path):
    record = SweepRecord(["seed=0,1,2,3"], None, ["done", "broken", "stopped", "killed", "later"])
    open_sweep(tmp_path / "sweep", record, resume=False)
    write_run(tmp_path / "sweep/done", [(0, {}), (1, {})], {})
    record_failure(tmp_path / "sweep/broken", 2, "x: must be 1")
    record_failure(tmp_path / "sweep/stopped", 143, "Stopped by SIGTERM")
    (tmp_path / "sweep/killed").mkdir()
    (tmp_path / "sweep/killed/config.yaml").touch()
    (tmp_path / "sweep/.submitit").mkdir()
    write_run(tmp_path / "sweep/older", [(0, {}), (1, {})], {})
    assert list(unfinished(jobs_of(tmp_path / "sweep"))) == [
        "  broken   failed: x: must be 1",
        "  stopped  interrupted",
        "  killed   interrupted",
        "  later    not started",
    ]
    assert [job.name for job in jobs_of(tmp_path / "sweep") if job.status == "finished"] == ["done", "older"]
