"""``launch.num_processes`` starts the ranks; whatever ends them, the run ends soon, says why and leaves none behind."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mtl import ranks, sweep, train
from mtl.cli import main
from mtl.errors import RankError, Stopped, UserError
from mtl.launch import LOST, RankFailed, new_folder, raise_cause
from mtl.start import Ending

ROOT = Path(__file__).parents[1]
ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
]
TWO = "launch.num_processes=2"
QUIET = "hydra/job_logging=disabled"  # otherwise Hydra leaves a log file open
ENDLESS = ["max_steps=1000000", "eval_steps=20"]
OWN_SAMPLER = """
import os
from mtl.samplers import Equal

class Raises(Equal):
    def counts(self, num_examples):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3 and os.environ.get("RANK") == "1":
            raise ValueError("third call of rank 1")
        return super().counts(num_examples)
"""


@pytest.fixture
def overrides(tmp_path, monkeypatch, tiny_folder, make_task):
    """A run of four steps in an empty folder; a sampler of the user's own is at hand."""
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path / "own")]))
    for name, content in {"own": OWN_SAMPLER, "work": None}.items():
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "own_sampler_of_rank_1.py").write_text(content)
    monkeypatch.chdir(tmp_path / "work")
    paths = {
        name: make_task(name, [{"prompt": f"{name} {i}", "completion": "ab" * (1 + i % 5)} for i in range(size)])
        for name, size in {"one": 20, "two": 50}.items()
    }
    return [
        *(f"model.name_or_path={tiny_folder}", "tasks=none", *(f"tasks.{name}.path={paths[name]}" for name in paths)),
        *("max_steps=4", "batch_size=4", "eval_scores=false", "max_eval_examples=2", "max_test_examples=2"),
        *("evals_per_stage=1", "adapters.lora_r=2", "adapters.private_lora_r=2"),
    ]


def run(*arguments, command=("-m", "mtl.train")):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, *command, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


class Started:
    """A run in the background, once it has saved, with its processes."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mtl.train", "output_dir=out", *arguments, *ENDLESS],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: any(Path("out/checkpoints").glob("step-*0")) or self.process.poll() is not None)
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.ranks = {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}

    def end(self, seconds):
        """Exit code and stderr of the launcher, once it and all ranks are gone."""
        _, err = self.process.communicate(timeout=seconds)
        _, alive = psutil.wait_procs(self.ranks.values(), timeout=seconds)
        assert not alive
        return self.process.returncode, err


@pytest.fixture
def start():
    started = []
    yield lambda *arguments: started.append(Started(*arguments)) or started[-1]
    for item in started:
        for process in (item.process, *item.ranks.values()):
            if process.poll() is None if isinstance(process, subprocess.Popen) else process.is_running():
                process.kill()


def wait_until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_is_that_of_accelerate_launch(overrides):
    ours = run(TWO, *overrides, "output_dir=ours")
    assert ours.returncode == 0, ours.stderr
    theirs = run(*overrides, "output_dir=theirs", command=[*ACCELERATE, "-m", "mtl.train"])
    assert theirs.returncode == 0, theirs.stderr
    assert Path("ours/metrics.jsonl").read_bytes() == Path("theirs/metrics.jsonl").read_bytes()
    assert "num_processes: 2" in Path("ours/config.yaml").read_text()
    assert {path.name for path in Path().iterdir()} == {"ours", "theirs"}


def test_a_sweep_goes_on_after_a_job_that_fails_in_the_ranks(overrides):
    good = next(item for item in overrides if item.startswith("tasks.one.path="))
    Path("broken.jsonl").write_text('{"prompt": "a", "completion":')
    finished = run(
        "-m", *overrides, TWO, f"tasks.one.path=broken.jsonl,{good.partition('=')[2]}", "hydra.sweep.dir=sweep"
    )
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[0].startswith("mtl: error: broken.jsonl:1 is not JSON")
    assert finished.stderr.splitlines()[1] == "1 of 2 jobs have not finished:"
    assert "failed: broken.jsonl:1 is not JSON" in finished.stderr.splitlines()[2]
    assert len(list(Path("sweep").rglob("results.json"))) == 1


def test_a_rank_that_is_killed_ends_the_run(start, overrides):
    started = start(*overrides, TWO)
    begin = time.monotonic()
    started.ranks[1].kill()
    code, err = started.end(60)
    assert time.monotonic() - begin < 60
    assert code == 1
    assert err == (
        "mtl: error: rank 1 was killed by SIGKILL (as the system does when memory runs out); the other processes were "
        "stopped. Go on with output_dir=out resume_from_checkpoint=auto.\n"
    )


def test_ranks_end_with_a_launcher_that_is_killed(start, overrides):
    started = start(*overrides, TWO)
    started.process.kill()
    code, _ = started.end(20)
    assert code == -signal.SIGKILL


def test_a_signal_to_the_launcher_stops_the_run_with_its_work_saved(start, overrides):
    started = start(*overrides, TWO)
    started.process.terminate()
    code, err = started.end(60)
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in err
    steps = [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert Path(f"out/checkpoints/step-{steps[-1]:06d}/manifest.json").exists()


def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_step(start, overrides):
    started = start(*overrides, TWO)
    started.ranks[1].send_signal(signal.SIGINT)
    code, err = started.end(60)
    assert code == 128 + signal.SIGINT
    assert "Traceback" not in err
    steps = [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert Path(f"out/checkpoints/step-{steps[-1]:06d}/manifest.json").exists()


@pytest.mark.parametrize("command", ["ours", "theirs"])
def test_an_error_of_one_rank_is_named(overrides, command):
    given = [*overrides, "output_dir=out", "sampler=equal", "sampler._target_=own_sampler_of_rank_1.Raises"]
    if command == "ours":
        finished = run(TWO, *given)
        last = finished.stderr.splitlines()[-1]
        assert last == "mtl: error: rank 1 failed: ValueError: third call of rank 1; the other processes were stopped."
        assert finished.stderr.count("Traceback") == 1
    else:
        finished = run(*given, command=[*ACCELERATE, "-m", "mtl.train"])
        assert "rank      : 1 (local_rank: 1)" in finished.stderr
    assert finished.returncode == 1
    assert "ValueError: third call of rank 1" in finished.stderr
    assert "Connection closed" not in finished.stderr


def test_mistakes_are_found_before_a_process_is_started(overrides, monkeypatch, capsys):
    monkeypatch.setattr("mtl.start.run_processes", lambda *arguments, **options: pytest.fail("started"))
    for given, expected in {
        "sampler.temperature=0": "sampler.temperature: must be above 0",
        "launch.num_proceses=3": "launch.num_proceses: there is no such option. Did you mean num_processes?",
        "launch.cpu=false": "launch.cpu=false: must not be false without a GPU.",
        "launch.num_processes=0": "launch.num_processes=0: must be at least 1.",
        "launch.num_processes=two": "launch.num_processes=two: must be a whole number or null.",
        "launch.num_machines=2": "launch.main_process_ip=null: must be the address of the machine of rank 0.",
    }.items():
        assert main(["train", *overrides, TWO, given]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"mtl: error: {expected}"), err
        assert err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_a_sweep_ends_with_a_job_that_was_stopped(overrides, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        sweep, "attempt", lambda config, folder, debug: seeds.append(config.seed) or Ending(143, "stopped")
    )
    with pytest.raises(SystemExit) as stop:
        main(["train", "-m", *overrides, "seed=1,2", QUIET])
    assert stop.value.code == 143
    assert seeds == [1]


def test_jobs_of_a_sweep_choose_their_precision(overrides, capsys):
    given = [*overrides, "max_steps=1", "mixed_precision=no,bf16", "hydra.sweep.dir=sweep", QUIET]
    assert main(["train", "-m", *given]) == 0, capsys.readouterr().err
    losses = [Path(f"sweep/mixed_precision={kind}/metrics.jsonl").read_text() for kind in ("no", "bf16")]
    assert losses[0] != losses[1]


def test_runs_of_the_same_second_have_folders_of_their_own(overrides, monkeypatch):
    monkeypatch.setattr(train, "datetime", SimpleNamespace(now=lambda: datetime(2030, 1, 2, 3, 4, 5)))
    for _ in range(2):
        assert main(["train", *overrides, "max_steps=1"]) == 0
    assert {str(path.parent) for path in Path().glob("outputs/*/*/results.json")} == {
        "outputs/2030-01-02/03-04-05",
        "outputs/2030-01-02/03-04-05-2",
    }


def test_a_new_folder_is_nobody_elses_and_goes_if_it_stays_empty(tmp_path):
    wanted = tmp_path / "outputs" / "date" / "time"

    def use(number):
        with new_folder(wanted) as folder:
            (folder / "mine").write_text(str(number))
        return folder

    with ThreadPoolExecutor(16) as pool:
        folders = set(pool.map(use, range(64)))
    assert folders == {wanted, *(wanted.with_name(f"time-{number}") for number in range(2, 65))}
    with new_folder(tmp_path / "empty" / "one"):
        pass
    assert not (tmp_path / "empty").exists()
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/x can't be made: Not a directory. Set output_dir="),
        new_folder(tmp_path / "file" / "x"),
    ):
        pass


def failure(exitcode, timestamp, message="", *, lost=False):
    report = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": timestamp, LOST: lost}}
    signal_name = signal.Signals(-exitcode).name if exitcode < 0 else ""
    return SimpleNamespace(
        exitcode=exitcode, timestamp=timestamp, message=report if message else "", signal_name=lambda: signal_name
    )


@pytest.mark.parametrize(
    ("failures", "kind", "expected"),
    [
        ({0: failure(-15, 7), 1: failure(-9, 7)}, RankFailed, "rank 1 was killed by SIGKILL"),
        ({0: failure(1, 6, "closed", lost=True), 1: failure(-9, 7)}, RankFailed, "rank 1 was killed by SIGKILL"),
        ({1: failure(-11, 7), 0: failure(-9, 37)}, RankFailed, "rank 1 was killed by SIGSEGV"),
        ({0: failure(-9, 37), 1: failure(1, 7, "ValueError: x")}, RankFailed, "rank 1 failed: ValueError: x"),
        ({0: failure(1, 7, "closed", lost=True)}, RankFailed, "rank 0 lost its connection to another: closed"),
        ({3: failure(7, 7)}, RankFailed, "rank 3 ended with exit code 7"),
        ({0: failure(-15, 7), 1: failure(2, 7, "rank 1: Out of memory")}, UserError, "rank 1: Out of memory"),
        ({0: failure(143, 7), 1: failure(-15, 7)}, Stopped, ""),
        ({0: failure(-15, 7), 1: failure(-15, 7)}, Stopped, ""),
    ],
)
def test_the_cause_is_told_from_what_follows(failures, kind, expected):
    with pytest.raises(kind) as error:
        raise_cause(failures)
    assert str(error.value).startswith(expected)
    if kind is Stopped:
        assert error.value.exit_code == 143


@pytest.mark.parametrize(
    ("rank", "launcher", "error", "spoken"),
    [
        ("0", None, UserError("x"), "mtl: error: x\n"),
        ("1", None, UserError("x"), ""),
        ("1", None, RankError("x"), "mtl: error: rank 1: x\n"),
        ("0", "1", UserError("x"), ""),
        ("1", "1", RankError("x"), ""),
    ],
)
def test_a_mistake_is_told_once(tmp_path, monkeypatch, capsys, rank, launcher, error, spoken):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    if launcher:
        monkeypatch.setenv(ranks.LAUNCHER, launcher)
    waited = []
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    ranks.report(error, str(error), debug=False)
    assert capsys.readouterr().err == spoken
    # A rank that leaves the word to rank 0 must not be the first to end: torch's agent would stop that one.
    assert bool(waited) == (not spoken and launcher is None)
    word = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert word == (f"rank {rank}: x" if isinstance(error, RankError) else "x")


def test_one_process_reports_no_rank(capsys):
    ranks.report(RankError("x"), "x", debug=False)
    assert capsys.readouterr().err == "mtl: error: x\n"
