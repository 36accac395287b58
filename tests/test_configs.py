"""Every option file composes, says every argument, and trains; a run's own config runs it again."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from mtl.cli import main
from mtl.composition import composed, settings_of
from mtl.models.load import ModelSettings
from mtl.schema import SUPPLIED
from mtl.stages import Stage

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
# The levers' own options train, and resume, in tests/resuming/test_combinations.py.
TWO_STAGES = {
    "joint_then_weak": ["joint", "weak"],
    "demo": ["joint", "weak"],
    "weak_private": ["joint", "weak_private"],
    "weak_replay": ["joint", "weak_replay"],
    "intermediate_then_target": ["intermediate", "target"],
}
TRAINED = ("optimizer", "scheduler", "stages", "strategy", "experiment")
SWEEPS = ("compare", "single_task", "tuned_static")  # jobs of a sweep: tests/test_sweep.py
TASKS = ("tasks=[quartz,inflect]", "tasks.quartz.max_train_examples=12", "tasks.inflect.max_train_examples=12")
SHORT = (
    "tasks.inflect.max_new_tokens=2",
    "max_length=512",
    "batch_size=4",
    "stages.joint.max_steps=2",
    "max_eval_examples=2",
    "max_test_examples=2",
)


# What an option can't do without, for a run on these tasks.
GIVEN = {
    "task_groups": lambda tasks: [f"adapters.groups.all=[{','.join(tasks)}]"],
    "doremi": lambda tasks: [f"sampler.references.{task}=2.0" for task in tasks],
    "specified": lambda tasks: [f"sampler.probabilities.{task}=1" for task in tasks],
    "excessdro": lambda tasks: [f"weighter.references.{task}=2.0" for task in tasks],
}


def given(choice, *tasks):
    """The overrides that go with a choice; skips what is not installed."""
    if choice == "torchjd":
        pytest.importorskip("torchjd")
    return GIVEN[choice](tasks) if choice in GIVEN else []


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def short_run(tmp_path, monkeypatch, cache, tiny_folder):
    """Two steps on the tiny model and two tasks of few examples; gives the overrides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_CACHE", str(cache))
    return [*TASKS, *SHORT, f"model.name_or_path={tiny_folder}"]


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: str(value))
def test_every_choice_composes(group, choice, tmp_path):
    tasks = [choice, "g2p"] if group == "tasks" else ["sentiment", "g2p"]
    override = [] if group == "tasks" else [f"{group}={choice}", *given(choice, *tasks)]
    settings = settings_of(composed([f"tasks=[{','.join(tasks)}]", *override]), tmp_path)
    assert settings.tasks
    assert len(settings.stages) == (2 if choice in TWO_STAGES else 1)


@pytest.mark.parametrize(
    ("group", "choice"),
    [item for item in CHOICES if item[0] in TRAINED and item[1] not in SWEEPS],
    ids=lambda value: str(value),
)
def test_every_choice_trains(group, choice, short_run, capsys):
    names = TWO_STAGES.get(choice, ["joint"])
    overrides = [item for item in short_run if not item.startswith("stages.")]
    steps = [f"stages.{name}.max_steps=2" for name in names]
    assert main(["train", f"{group}={choice}", *overrides, *steps, "output_dir=out"]) == 0, capsys.readouterr().err
    results = json.loads(Path("out/results.json").read_text())
    assert results["cost"]["steps"] == 2 * len(names)
    assert set(results["tasks"]) == {"quartz", "inflect"}


@pytest.mark.parametrize(
    ("group", "choice"), [item for item in CHOICES if item[0] in SUPPLIED], ids=lambda value: str(value)
)
def test_yaml_says_every_argument(group, choice):
    """What a file leaves out a user can't see, and what it says of a default must be said on purpose."""
    config = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"))
    arguments = set(inspect.signature(get_object(config["_target_"])).parameters)
    assert {key for key in config if not key.startswith("_")} == arguments - set(SUPPLIED[group])


@pytest.mark.parametrize("kind", [ModelSettings, Stage])
def test_yaml_says_every_field(kind):
    group = {ModelSettings: "model", Stage: "stages"}[kind]
    fields = set(inspect.signature(kind).parameters) - ({"name"} if kind is Stage else set())
    for path in (CONF / group).glob("*.yaml"):
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for values in config["stages"].values() if kind is Stage else [config]:
            assert set(values) == fields


def test_every_file_begins_with_what_it_is():
    for group, choice in CHOICES:
        lines = (CONF / group / f"{choice}.yaml").read_text().splitlines()
        is_global = lines[0] == "# @package _global_"
        assert lines[1 if is_global else 0].startswith("# ")
        assert is_global == (group in ("strategy", "stages", "experiment") or choice in ("slurm", "joblib", "optuna"))


def test_config_of_a_run_runs_it_again(short_run, capsys):
    levers = ["sampler=performance", "sampler.targets={quartz: 0.9}", "weighter=uncertainty", "surgery=pcgrad"]
    first = [*short_run, *levers, "share=equal", "seed=3", "adapters.lora_dropout=0.1", "output_dir=first"]
    assert main(["train", *first]) == 0
    assert main(["train", "--config", "first/config.yaml", "output_dir=again"]) == 0, capsys.readouterr().err
    assert Path("again/metrics.jsonl").read_bytes() == Path("first/metrics.jsonl").read_bytes()
    configs = [OmegaConf.to_container(OmegaConf.load(f"{run}/config.yaml")) for run in ("first", "again")]
    assert configs[0] == configs[1] | {"output_dir": "first"}

    assert main(["train", "--config", "first/config.yaml", "output_dir=other", "seed=4"]) == 0
    assert Path("other/metrics.jsonl").read_bytes() != Path("first/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["train", "--config", "first/config.yaml"]) == 2
    assert "output_dir=first already holds a run" in capsys.readouterr().err
    assert main(["train", "--config", "first/config.yaml", "output_dir=x", "sampler.tragets=1"]) == 2
    assert "sampler.tragets: there is no such option. Did you mean targets?" in capsys.readouterr().err
    assert main(["train", "--config", "first/config.yaml", "output_dir=x", "sampler=equal"]) == 2
    assert capsys.readouterr().err.startswith("mtl: error: sampler: this config has no such choice to override.")


def run_mtl(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mtl.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_sweep_names_its_folders_by_what_varies_and_outlives_a_bad_combination(short_run):
    answer = run_mtl("train", "-m", *short_run, "strategy=temperature,pcgrad", "learning_rate=1e-3,-1", "max_steps=1")
    assert answer.returncode == 2
    errors = [line for line in answer.stderr.splitlines() if line.startswith("mtl: error: ")]
    assert errors == ["mtl: error: learning_rate=-1.0: must be above 0. Correct the value."] * 2
    assert "2 of 4 jobs have not finished:" in answer.stderr
    assert "Traceback" not in answer.stderr
    runs = {path.parent.name: json.loads(path.read_text()) for path in Path("multirun").glob("*/*/*/results.json")}
    assert set(runs) == {"temperature,learning_rate=0.001", "pcgrad,learning_rate=0.001"}
    assert {run["strategy"]["surgery"] for run in runs.values()} == {"Mean", "PCGrad"}


def test_wheel_holds_configs_and_suite(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("mtl", "conf", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "--no-index", "-w", str(tmp_path / "wheel")], check=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"mtl/conf/{path.relative_to(CONF)}" for path in CONF.rglob("*.yaml")}
    suite = ROOT / "mtl" / "tasks" / "suite"
    data = {f"mtl/tasks/suite/{path.relative_to(suite)}" for path in suite.rglob("*") if path.is_file()}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "mtl").rglob("*.py")}
    assert "mtl/conf/train.yaml" in configs
    assert len(data) > 24
    assert configs | data | code <= held
