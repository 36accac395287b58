"""Every mistake that a user can make is one line on stderr and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtl.cli import main

ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": f"What is {n} plus one?", "completion": str(n + 1)} for n in range(20)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a task that is fine: ``mine.jsonl``."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    write_rows("mine.jsonl", ROWS)
    return folder


def write_rows(name, rows):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tree(folder):
    """All there is, with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refuse(folder, tiny_folder, capsys):
    """Runs ``mtl train`` on the tiny model and the task ``mine`` and returns the one line that it must end with."""

    def run(*overrides, options=(), tasks=("tasks=none", "tasks.mine.path=mine.jsonl"), output_dir="out"):
        before = tree(folder)
        given = [*options, f"model.name_or_path={tiny_folder}", f"output_dir={output_dir}", *tasks, *overrides]
        code = main(["train", *given])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert err.startswith("mtl: error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in out + err
        assert tree(folder) == before
        return err

    return run


def test_missing_file(refuse):
    line = refuse("tasks.mine.path=nowhere.jsonl")
    assert "tasks.mine.path: 'nowhere.jsonl' does not exist. Correct the path" in line


def test_empty_file(refuse):
    Path("mine.jsonl").write_text("")
    line = refuse()
    assert "Task 'mine' has no training rows: the train split of mine.jsonl is empty. Fill it." in line


def test_broken_json_names_the_line(refuse):
    write_rows("mine.jsonl", ROWS)
    with Path("mine.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": \n')
    line = refuse()
    assert "mine.jsonl:21 is not JSON" in line
    assert "Correct or remove the line." in line


def test_row_without_the_needed_keys(refuse):
    write_rows("mine.jsonl", [*ROWS[:4], {"prompt": "a", "answer": "b"}, *ROWS[4:]])
    line = refuse()
    assert "Task 'mine': mine.jsonl:5 has no \"completion\"" in line
    assert "Found keys: prompt, answer. Rename the key" in line


def test_empty_answer(refuse):
    write_rows("mine.jsonl", [*ROWS, {"prompt": "a", "completion": " "}])
    line = refuse()
    assert 'mine.jsonl:21 has an empty "completion"' in line
    assert "Fill or remove the row." in line


def test_answer_that_max_length_cuts_away(refuse):
    write_rows("mine.jsonl", [*ROWS, {"prompt": "a" * 300, "completion": "b"}])
    line = refuse("max_length=128")
    assert "mine.jsonl:21 has 3" in line
    assert "max_length=128 cuts the answer away. Raise max_length" in line


def test_task_without_validation_rows(refuse):
    write_rows("mine/train.jsonl", ROWS)
    Path("mine/val.jsonl").write_text("")
    line = refuse("tasks.mine.path=mine")
    assert "Task 'mine' has no validation rows: the val split of mine is empty." in line
    assert "have the split made from train" in line


def test_task_too_small_for_validation_rows(refuse):
    write_rows("mine.jsonl", ROWS[:2])
    line = refuse()
    assert "Task 'mine' has no validation rows, and train is too small" in line
    assert "Add a val file" in line


def test_unwritable_output_folder(refuse):
    for output_dir, reason in (("mine.jsonl/out", "is a file"), ("/proc/mtl-out", "can't be written to")):
        line = refuse(output_dir=output_dir)
        assert f"output_dir={output_dir}" in line
        assert reason in line
        assert "Choose another folder." in line


def test_output_folder_that_holds_a_run(refuse):
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("{}\n")
    line = refuse()
    assert (
        "output_dir=out already holds a run. Choose another folder, or go on with resume_from_checkpoint=auto" in line
    )


def test_model_folder_without_weights(refuse, tiny_folder):
    Path("model").mkdir()
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            Path("model", file.name).write_bytes(file.read_bytes())
    line = refuse("model.name_or_path=model")
    assert "model.name_or_path=model holds no *.safetensors weights. Give a folder" in line


CONFIGS = {
    "top": "wights: 3",
    "own_task": "tasks: {mine: {metrik: bleu}}",
    "lever": "sampler: {temprature: 3}",
    "duplicate": "tasks:\n  mine: {path: a.jsonl}\n  mine: {path: b.jsonl}",
    "case": "tasks: {Mine: {path: mine.jsonl}}",
    "broken": "tasks: [a\nb: {",
    "wrong_type": "seed: many",
}


@pytest.mark.parametrize(
    ("name", "place", "remedy"),
    [
        ("top", "experiment/top.yaml: wights: there is no such option", "mtl train --cfg"),
        ("own_task", "tasks.mine.metrik: there is no such option", "Did you mean metric?"),
        ("lever", "sampler.temprature: there is no such option", "Did you mean temperature?"),
        ("duplicate", "experiment/duplicate.yaml:4: found duplicate key mine", "Correct the file."),
        ("case", "Task 'mine': the name collides with task 'Mine'", "Rename one of them."),
        ("broken", "experiment/broken.yaml:3: expected ',' or ']'", "Correct the file."),
        ("wrong_type", "experiment/wrong_type.yaml: seed=many: must be a whole number", "Correct the value."),
        ("absent", "experiment=absent: there is no such choice", "There are: "),
    ],
)
def test_mistake_in_a_config_file(refuse, name, place, remedy):
    Path("conf/experiment").mkdir(parents=True)
    for config, text in CONFIGS.items():
        Path(f"conf/experiment/{config}.yaml").write_text(f"# @package _global_\n{text}\n")
    line = refuse(f"experiment={name}", options=["--config-dir", "conf"])
    assert place in line
    assert remedy in line


def test_config_file_that_forgets_where_its_keys_belong(refuse):
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/lost.yaml").write_text("max_steps: 3\n")
    line = refuse("experiment=lost", options=["--config-dir", "conf"])
    assert "experiment/lost.yaml" in line
    assert "Put '# @package _global_' in its first line." in line


COMMAND_LINES = {
    "unknown_key": ("sede=3", "sede: there is no such option. Did you mean seed?"),
    "unknown_key_with_plus": ("+wights=3", "wights: there is no such option. All of them: mtl train --cfg."),
    "unknown_key_of_a_task": (
        "tasks.mine.metrik=bleu",
        "tasks.mine.metrik: there is no such option. Did you mean metric",
    ),
    "unknown_key_of_a_stage": (
        "stages.joint.steps=3",
        "stages.joint.steps: there is no such option. There are: tasks, weakness, num_",
    ),
    "unknown_key_of_the_model": ("model.name=x", "model.name: there is no such option. There are: name_or_path"),
    "unknown_sampler_option": (
        "sampler.temprature=3",
        "sampler.temprature: there is no such option. Did you mean temp",
    ),
    "argument_of_the_run": ("optimizer.lr=3", "optimizer.lr: is set by the run and can't be set here. Remove it."),
    "unknown_choice": ("sampler=temprature", "sampler=temprature: there is no such choice. Did you mean temperature?"),
    "unknown_builtin_task": ("tasks=[foo]", "tasks=foo: there is no such choice. There are: "),
    "group_without_choice": ("sampler=null", "sampler=null: "),
    "unknown_metric": ("tasks.mine.metric=blue", "tasks.mine.metric: Unknown metric 'blue'. Choose one of: accuracy"),
    "task_names_equal_but_for_case": ("tasks.Mine.path=mine.jsonl", "Task 'Mine': the name collides with task 'mine'"),
    "task_that_is_no_mapping": ("tasks.mine=3", "tasks.mine=3: must be a mapping of options. Write tasks.mine.<"),
    "no_task": ("~tasks.mine", "tasks: there is none. Take tasks=[sentiment,g2p] or give your own"),
    "temperature_0": ("sampler.temperature=0", "sampler.temperature: must be above 0, found 0; 1 is proportional"),
    "text_for_a_number": ("sampler.temperature=hot", "sampler: Temperature(temperature='hot', max_size=None): "),
    "text_for_the_scheduler": (
        "scheduler.num_cycles=x",
        "scheduler: get_cosine_schedule_with_warmup: could",
    ),
    "resuming_by_hand": ("scheduler.last_epoch=3", "scheduler.last_epoch: is set by the run and can't be set here."),
    "weight_of_the_optimizer": ("optimizer.weight_decay=-1", "optimizer: AdamW: Invalid weight_decay value: -1"),
    "unknown_task_in_a_stage": (
        "stages.joint.tasks=[foo]",
        "stages.joint.tasks=foo: must be among the run's tasks, mine",
    ),
    "more_weak_tasks_than_tasks": (
        "stages.joint.tasks=weakest",
        "stages.joint.num_weakest=2: must not exceed the number",
    ),
    "unknown_stage": ("stage_order=[last]", "stage_order: last is not in stages, which has joint. Correct one."),
    "no_stage": ("stage_order=[]", "stage_order: is empty. Name at least one of the stages."),
    "no_checkpoint": ("resume_from_checkpoint=nowhere", "resume_from_checkpoint=nowhere: no checkpoint there. Give a "),
    "fp8": ("mixed_precision=fp8", "mixed_precision=fp8: must be one of auto, no, bf16, fp16."),
    "text_for_a_whole_number": ("batch_size=two", "batch_size=two: must be a whole number. Correct the value."),
    "fraction_for_a_whole_number": ("batch_size=2.5", "batch_size=2.5: must be a whole number. Correct the value."),
    "text_for_a_truth_value": ("model.trust_remote_code=maybe", "model.trust_remote_code=maybe: must be true or false"),
    "number_for_text": ("model.name_or_path=3", "model.name_or_path=3: must be text. Correct the value."),
    "null": ("seed=null", "seed=null: must have a value. Leave it out for the default."),
    "deleted": ("~seed", "seed: must be given. Set seed=<value>"),
    "not_a_number": ("learning_rate=nan", "learning_rate=nan: must be above 0. Correct the value."),
    "negative_rate": ("learning_rate=-1", "learning_rate=-1.0: must be above 0. Correct the value."),
    "no_key": ("foo", "foo: must be of the form key=value. Put a value"),
    "open_bracket": ("stage_order=[joint", "stage_order=[joint: must be of the form key=value. Put a value"),
    "sweep_without_m": ("seed=1,2", "To sweep over it, add --multirun to your command line"),
    "undefined_variable": ("output_dir=${oc.env:NOT_SET}", "output_dir: "),
    "class_that_is_not_there": ("sampler._target_=mine.Own", "sampler._target_=mine.Own: "),
    "chinese": ("tasks.情感.metrik=bleu", "tasks.情感.metrik: there is no such option. Did you mean metric?"),
}


LEVERS = {
    "surgery=crmogm surgery.inner._target_=mtl.surgery.GradDrop": "surgery.inner: must be surgery that works by coeff",
    "surgery=crmogm surgery.inner.alpha=3": "surgery.inner.alpha: there is no such option. There are: scale.",
    "surgery=graddrop surgery_every=2": "surgery_every=2: surgery=GradDrop has no coefficients that could be kept. Set",
    "surgery=upgrad surgery_every=2 surgery_granularity=layer": "Set one of them back.",
    "surgery_granularity=layers": "surgery_granularity=layers: must be one of global, layer, module.",
    "surgery=nashmtl weighter=uncertainty": "loss weights act through it: no. Take weighter=equal, another surgery, or",
    "surgery=mgda weighter=rlw": "loss weights act through it: reversed. Take weighter=equal, another surgery, or",
    "surgery=pcd surgery.primary=foo": "surgery.primary: must be a task of the run, found 'foo'; the tasks are",
    "weighter=dtp eval_scores=false": "weighter=DTP goes by validation scores, and eval_scores=false computes none.",
    "sampler=doremi": "sampler.references: must name every task, found nothing for 'mine'; add it",
    "adapters=task_groups": "adapters.groups: must be given. Set adapters.groups=<value>, or several below it.",
    "adapters=task_groups adapters.groups.x=[foo]": "adapters.groups.x: foo is not a task of the run, which has mine.",
    "adapters=shared_and_per_task adapters.use_dora=true": "two DoRA adapters can't be exported as one. Set one",
}


@pytest.mark.parametrize("overrides", LEVERS)
def test_levers_that_do_not_fit(refuse, overrides):
    assert LEVERS[overrides] in refuse(*overrides.split())


@pytest.mark.parametrize("case", COMMAND_LINES)
def test_mistake_on_the_command_line(refuse, case):
    override, expected = COMMAND_LINES[case]
    assert expected in refuse(override)


def test_negative_weight(refuse):
    line = refuse("weighter=static", "weighter.weights={mine: -1}")
    assert "weighter.weights: must be finite and not negative, found -1.0 for task mine; 0 switches" in line


def test_weight_of_a_task_that_is_not_there(refuse):
    line = refuse("weighter=static", "weighter.weights={yours: 1}")
    assert "weighter.weights: must name tasks of the run, found 'yours'" in line


OWN_CLASS = """
class Own:
    def __init__(self, sizes, alpha):
        if alpha < 0:
            raise ValueError("alpha is below zero, I need more")
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{}", "sampler: Own(): Own.__init__() missing 1 required positional argument: 'alpha'"),
        ("{alpha: -1}", "sampler: Own: alpha is below zero, I need more"),
        ("{alpha: x}", "sampler: Own(alpha='x'): '<' not supported"),
        ("{alpa: 1}", "sampler.alpa: there is no such option. Did you mean alpha?"),
        ("{sizes: [1]}", "sampler.sizes: is set by the run"),
    ],
)
def test_class_of_the_users_own_that_refuses(refuse, monkeypatch, tmp_path, options, expected):
    (tmp_path / "own_sampler_that_refuses.py").write_text(OWN_CLASS)
    monkeypatch.syspath_prepend(tmp_path)
    Path("conf/sampler").mkdir(parents=True)
    fields = {"_target_": "own_sampler_that_refuses.Own", "_partial_": True}
    lines = [f"{key}: {value}" for key, value in fields.items()]
    lines += [item.strip() for item in options.strip("{}").split(",") if item.strip()]
    Path("conf/sampler/own.yaml").write_text("\n".join(lines) + "\n")
    assert expected in refuse("sampler=own", options=["--config-dir", "conf"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown verb 'trian'. There are: train, report, export, eval, predict, chat, strategies"),
        (["train", "--turbo"], "Unknown option --turbo. See mtl train --help."),
        (["train", "-x"], "Unknown option -x. See mtl train --help."),
        (["train", "--config-dir"], "--config-dir: expected one argument. See mtl train --help."),
        (["train", "--config-dir", "nowhere"], "--config-dir=nowhere: must be a folder. Give"),
        (
            ["train", "--config", "nowhere.yaml"],
            "--config=nowhere.yaml: must be a file. Give the config.yaml of a run.",
        ),
        (
            ["train", "--config", "mine.jsonl"],
            "mine.jsonl:2: expected '<document start>', but found '{'. Correct the file.",
        ),
        (["train", "-m", "--config", "x.yaml"], "-m and --config: a sweep starts from conf/train.yaml."),
        (
            ["train", "-m", "seed=1,2", "sampler=equal,foo"],
            "sampler=foo: there is no such choice. There are: annealed, curriculum",
        ),
        (["train", "-m", "sede=1,2"], "sede: there is no such option. Did you mean seed?"),
    ],
)
def test_mistake_in_the_arguments(folder, capsys, arguments, expected):
    before = tree(folder)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("mtl: error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert "Traceback" not in out + err
    assert tree(folder) == before


def test_sweep_inside_a_launcher(refuse, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refuse("seed=1,2", options=["-m"])
    assert "A sweep can't run inside accelerate launch" in line
    assert "Run: mtl train -m" in line


def test_debug_shows_the_traceback(folder, capsys):
    assert main(["train", "--debug", "sede=3"]) == 2
    assert "Traceback" in capsys.readouterr().err


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


def test_help_is_quick_and_fits_one_screen():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        answer = run_python("-m", "mtl.cli", "--help")
        times.append(time.perf_counter() - start)
    assert min(times) < 1
    for shown in (answer, run_python("-m", "mtl.cli", "train", "--help")):
        assert shown.returncode == 0
        assert shown.stderr == ""
        assert 5 < shown.stdout.count("\n") < 40


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import mtl.cli", {"torch", "hydra", "omegaconf", "transformers", "numpy"}),
        ("import mtl.cli; mtl.cli.main(['train', '--help'])", {"torch", "transformers", "numpy"}),
    ],
)
def test_imports_no_more_than_needed(statement, forbidden):
    answer = run_python("-c", f"{statement}\nimport sys; print(*sys.modules)")
    assert answer.returncode == 0, answer.stderr
    assert not forbidden & set(answer.stdout.split())


@pytest.mark.parametrize("mistake", ["sede=3", "tasks.mine.path=broken.jsonl"])
def test_one_line_under_a_launcher(folder, tiny_folder, mistake):
    """The first is found by each process for itself, the second by one that tells the other."""
    Path("broken.jsonl").write_text('{"prompt": "a"}\n')
    before = tree(folder)
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    train = "--dynamo_backend no --main_process_port 0 -m mtl.train output_dir=out tasks=none"
    overrides = [f"model.name_or_path={tiny_folder}", "tasks.mine.path=mine.jsonl", mistake]
    answer = run_python("-m", *launch.split(), *train.split(), *overrides, ACCELERATE_USE_CPU="true")
    assert answer.returncode != 0
    assert "Traceback" not in answer.stdout
    lines = answer.stderr.splitlines()
    ours = [number for number, line in enumerate(lines) if line.startswith("mtl: error: ")]
    assert len(ours) == 1
    assert answer.stderr.count("mtl: error: ") == 1
    assert not any("Traceback" in line for line in lines[: ours[0]])
    assert tree(folder) == before
