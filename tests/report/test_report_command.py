"""``mtl report`` from end to end: what it writes and prints, what it refuses, how long it takes."""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtl.cli import main
from mtl.sweep_folder import SweepRecord, open_sweep, record_failure

ROOT = Path(__file__).parents[2]
SCORED = {"sentiment": "accuracy", "inflect": "exact_match"}


def report(*arguments):
    return main(["report", *map(str, arguments)])


def run_report(*arguments):
    """In a process of its own."""
    command = [sys.executable, "-m", "mtl.cli", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def change_lines(folder, task, change):
    """Applies ``change`` to a task's predictions as a list."""
    path = folder / "predictions" / f"{task}.jsonl"
    lines = change([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_end_to_end(make_run, tmp_path):
    runs, single = tmp_path / "runs", tmp_path / "single"
    for seed in (0, 1):
        for name, skill in {"equal": 0.4, "pcgrad": 0.8}.items():
            make_run(name, seed, skill=skill, num_steps=4)
    for task in ("sentiment", "inflect", "translate", "notes"):
        make_run(f"only_task={task}", folder=single, only_task=task, num_steps=4)
    open_sweep(runs, SweepRecord([], None, ["equal,seed=0", "equal,seed=1", "broken"]), resume=False)
    record_failure(runs / "broken", 1, "batch_size=0: must be above 0.")

    finished = run_report(runs, "--reference", single)
    assert (finished.returncode, finished.stderr) == (0, "")
    for part in (
        "* Undecided for the mean over the tasks: pcgrad is ahead, ",
        "* Undecided for the worst task: ",
        "change against single-task",
        "Failed, and not in here: 1 job, broken.",
        "failed: broken: batch_size=0: must be above 0.",
        f"The page: {runs / 'report' / 'report.html'}",
    ):
        assert part in finished.stdout
    assert "nan" not in finished.stdout
    summary, tasks = rows_of(runs / "report" / "summary.csv"), rows_of(runs / "report" / "tasks.csv")
    assert [row["strategy"] for row in summary] == ["pcgrad", "equal"]
    assert len(tasks) == 2 * 4 * 2
    page = (runs / "report" / "report.html").read_text(encoding="utf-8")
    assert "Undecided for the mean over the tasks: pcgrad" in page
    assert "&lt;b&gt;what?&lt;/b&gt;" in page  # of the worst examples
    assert len(list((runs / "report" / "charts").glob("*.svg"))) > 3


def test_the_report_of_an_earlier_day_is_no_run(make_run, tmp_path, capsys):
    for name in ("equal", "pcgrad"):
        make_run(name, tasks=SCORED, num_steps=4)
    for _ in range(2):
        assert report(tmp_path / "runs") == 0
    assert "left out" not in capsys.readouterr().out


def test_output_and_cases(make_run, tmp_path):
    folder = make_run(tasks=SCORED, num_steps=4)
    pages = {}
    for number in (0, 1, 5):
        assert report(folder, "--output", tmp_path / "page", "--cases", number) == 0
        pages[number] = (tmp_path / "page" / "report.html").read_text(encoding="utf-8").count("<b>what?")
        pages[number] = (tmp_path / "page" / "report.html").read_text(encoding="utf-8").count("&lt;b&gt;what?")
    assert pages[0] == 0 < pages[1] < pages[5]
    assert not (folder / "report").exists()


def test_cases_are_of_the_tasks_that_are_shown(make_run, tmp_path):
    """A page of a thousand tasks stays a page."""
    tasks = {f"task_{place}": "accuracy" for place in range(40)}
    folder = make_run(tasks=tasks, num_examples=3, num_steps=2, skill={name: len(name) / 9 for name in tasks})
    assert report(folder, "--output", tmp_path / "page") == 0
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "Of the 12 tasks shown above." in page
    assert page.count("<details><summary><bdi>task_") == 12


def test_single_task_runs_among_the_runs_are_the_reference(make_run, tmp_path, capsys):
    make_run("equal", tasks=SCORED, num_steps=4)
    for task in SCORED:
        make_run(f"only_task={task}", only_task=task, num_steps=4)
    assert report(tmp_path / "runs") == 0
    assert "against single-task" in capsys.readouterr().out
    other = make_run("other", folder=tmp_path / "other", tasks=SCORED, num_steps=4)
    assert report(tmp_path / "runs", "--reference", other) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "against other" in printed
    assert "note: --reference is given: 2 single-task runs beside the runs to compare are left out" in printed


def test_blind_comparison_and_its_judgements(make_run, tmp_path, capsys):
    folders = [make_run(name, skill=0.5, tasks=SCORED, num_steps=4) for name in ("equal", "pcgrad")]
    assert report(*folders, "--blind", "--output", tmp_path / "blind") == 0
    assert "pairs of answers to judge" in capsys.readouterr().out
    page, key = tmp_path / "blind" / "blind.html", tmp_path / "blind" / "blind_key.json"
    assert "pcgrad" not in page.read_text(encoding="utf-8")
    secret = json.loads(key.read_text())
    assert secret["strategies"] == ["equal", "pcgrad"]
    judgements = [{"item": item, "choice": "A", "seconds": 1.0} for item in secret["items"]]
    (tmp_path / "ann.json").write_text(
        json.dumps({"page": secret["page"], "judge": "Ann", "judgements": judgements}), encoding="utf-8"
    )
    assert report("--judgements", tmp_path / "ann.json", "--key", key) == 0
    assert "Ann" in capsys.readouterr().out


def three_runs(make_run):
    return [make_run(name, tasks=SCORED) for name in ("a", "b", "c")]


def other_reference(make_run):
    one, two, _ = three_runs(make_run)
    change_lines(two, "inflect", lambda lines: [*lines[:-1], lines[-1] | {"reference": "other"}])
    return one, two


def other_order(make_run):
    one, two, _ = three_runs(make_run)
    change_lines(two, "inflect", lambda lines: lines[::-1])
    return one, two


def fewer_examples(make_run):
    return make_run("a", tasks=SCORED), make_run("b", tasks=SCORED, num_examples=19)


def fewer_losses(make_run):
    return make_run("a", tasks={"notes": None}), make_run("b", tasks={"notes": None}, num_examples=19)


def other_losses_before(make_run):
    folders = [make_run(name, tasks={"notes": None}) for name in ("a", "b")]
    results = json.loads((folders[1] / "results.json").read_text())
    results["tasks"]["notes"]["base"]["loss"] = 2.6
    (folders[1] / "results.json").write_text(json.dumps(results))
    return folders


def fewer_predictions(make_run):
    one, two, _ = three_runs(make_run)
    change_lines(one, "inflect", lambda lines: lines[:-1])
    return one, two


def other_metric(make_run):
    return make_run("a", tasks=SCORED), make_run("b", tasks=SCORED | {"inflect": "accuracy"})


def other_tasks(make_run):
    return make_run("a", tasks=SCORED), make_run("b", tasks=SCORED | {"notes": None})


def task_without_reference(make_run):
    return make_run("a", tasks=SCORED), make_run("alone", tasks=SCORED, only_task="inflect")


def reference_of_other_examples(make_run):
    alone = [make_run(f"only_{task}", tasks=SCORED, only_task=task, num_examples=19) for task in SCORED]
    return make_run("a", tasks=SCORED), "--reference", *alone


def two_references(make_run):
    one, two, three = three_runs(make_run)
    return one, "--reference", two, three


def only_single_task_runs(make_run):
    return [make_run(f"only_{task}", tasks=SCORED, only_task=task) for task in SCORED]


def no_predictions(make_run):
    folder = make_run(tasks=SCORED)
    (folder / "predictions" / "sentiment.jsonl").unlink()
    return [folder]


def output_is_a_file(make_run):
    folder = make_run(tasks=SCORED, num_steps=4)
    return folder, "--output", folder / "results.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (other_reference, "b,seed=0 and {runs}/a,seed=0: must have the same test examples of inflect, and have others. "
         "Compare runs with the same data and max_test_examples."),
        (other_order, "b,seed=0 and {runs}/a,seed=0: must have the same test examples of inflect, and have others."),
        (fewer_examples, "b,seed=0 and {runs}/a,seed=0: must have the same test examples of sentiment, and have"),
        (fewer_losses, "b,seed=0 and {runs}/a,seed=0: must have the same test examples of notes, and have others."),
        (other_losses_before, "b,seed=0 and {runs}/a,seed=0: must have the same test examples of notes, and have"),
        (fewer_predictions, "a,seed=0: must have predictions of all 20 test examples of inflect, and has 19; run the "),
        (reference_of_other_examples, "only_sentiment,seed=0 and {runs}/a,seed=0: must have the same test examples of"),
        (other_metric, "a,seed=0 and {runs}/b,seed=0: must have the same metric of inflect, and have exact_match and "
         "accuracy. Compare runs with the same tasks."),
        (other_tasks, "b,seed=0 and {runs}/a,seed=0: must have the same tasks, and only one of them has notes. "),
        (task_without_reference, "error: --reference: must have a run of each task, and has none of sentiment. Run mtl "
         "train -m experiment=single_task on the same tasks."),
        (two_references, "error: --reference: must have runs of one strategy for sentiment, and has b and c. Name one"),
        (only_single_task_runs, "error: All runs are single-task runs, which are a reference. Name runs on several "),
        (no_predictions, "equal,seed=0/predictions/sentiment.jsonl: must be a file, and there is none; run the "),
        (output_is_a_file, "results.json: must be a folder that can be written, found: "),
        (lambda make_run: [*three_runs(make_run)[:2], "--blind", "--output", "/dev/null/here"], "/dev/null/here: must "
         "be a folder that can be written, found: Not a directory. Name another with --output."),
        (lambda make_run: [*three_runs(make_run), "--blind"], "error: --blind: needs two runs, and there are 3. Name"),
        (lambda make_run: [make_run("a", tasks={"n": None}), make_run("b", tasks={"n": None}), "--blind"],
         "b,seed=0 have no task with answers in common."),
        (lambda make_run: [make_run(), "--cases", "-1"], "error: --cases -1: must not be negative. Give a number, or "),
        (lambda make_run: [make_run(), "--cases", "many"], "error: argument --cases: invalid int value: 'many'"),
        (lambda make_run: [make_run(), "--refernce", "x"], "error: Unknown option --refernce. See mtl report --help."),
        (lambda make_run: [make_run(), "--ref", "x"], "error: Unknown option --ref. See mtl report --help."),
        (lambda make_run: [make_run(), "--reference", "nowhere"], "error: nowhere: must be the folder of a run, of a "),
        (lambda make_run: ["nowhere"], "error: nowhere: must be the folder of a run, of a sweep, or one that holds "),
        (lambda make_run: [], "error: RUNS: name at least one folder of runs or sweeps. See mtl report --help."),
        (lambda make_run: ["--judgements", "x.json"], "error: --judgements: needs --key, the blind_key.json that was "),
    ],
)  # fmt: skip
def test_what_is_refused_in_one_line(make_run, tmp_path, capsys, arguments, message):
    assert report(*arguments(make_run)) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("mtl: error: ")
    assert streams.err.count("\n") == 1
    assert message.format(runs=tmp_path / "runs") in streams.err


def test_refusals_show_no_traceback_unless_asked_for(tmp_path):
    for options in ([], ["--debug"]):
        finished = run_report(tmp_path, *options)
        assert ("Traceback" in finished.stderr) == bool(options)
        assert f"{tmp_path}: holds no finished run (results.json)." in finished.stderr
        assert finished.returncode == (1 if options else 2)


def test_help_is_there_at_once():
    """In .1 s where nothing else runs; without what takes long to import."""
    script = (
        "import sys; from mtl.cli import main; main(['report', '--help']); "
        "print([name for name in ('torch', 'matplotlib', 'numpy', 'yaml', 'rich') if name in sys.modules])"
    )
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "usage: mtl report RUNS..." in finished.stdout
    assert finished.stdout.endswith("[]\n")
    assert ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime < 0.3


@pytest.mark.slow
def test_200_runs_of_10_tasks(make_run, tmp_path):
    """30 strategies of 7 seeds, save 10 runs; 300 steps, 100 test examples a task. In CPU time: others run, too."""
    metrics = ["accuracy", "exact_match", "chrf", "bleu", "entity_f1"]
    tasks = {f"task_{place}": metrics[place % 5] for place in range(10)}
    pairs = [(f"strategy_{place}", seed) for seed in range(7) for place in range(30)][:200]
    for name, seed in pairs:
        make_run(
            name, seed, tasks=tasks, skill=0.3 + len(name) / 30, num_examples=100, num_steps=300, eval_every=60,
            conflict_every=20, scored=True,
        )  # fmt: skip
    for task in tasks:
        make_run(f"only_{task}", folder=tmp_path / "single", tasks=tasks, only_task=task, num_examples=100)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    finished = run_report(tmp_path / "runs", "--reference", tmp_path / "single")
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    page = tmp_path / "runs" / "report" / "report.html"
    print(f"{wall:.1f} s, {seconds:.1f} s of CPU, page of {page.stat().st_size / 1e6:.2f} MB")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert seconds < 20
    assert page.stat().st_size < 10e6
    assert len(rows_of(page.with_name("summary.csv"))) == 30
