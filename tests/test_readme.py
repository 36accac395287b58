"""What the README says is so: every command runs, every file and option it names exists."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from mtl.cli import main
from mtl.composition import config_dir
from mtl.evaluation.metrics import METRICS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line.partition("#")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith(("mtl ", "make ", "accelerate ", "tensorboard "))
]
TRAININGS = [
    command for command in COMMANDS if command.startswith("mtl train") and "..." not in command and "-m" not in command
]
GREETINGS = [{"prompt": f"Translate to French: good morning {i}", "completion": f"bonjour {i}"} for i in range(12)]
COLOURS = [{"prompt": f"Is colour {i} warm?", "completion": ["warm", "cold"][i % 2]} for i in range(12)]


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """A folder with the data and the YAML of the README."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for name, rows in (("greetings", GREETINGS), ("colours", COLOURS)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    [mine] = [block for language, block in BLOCKS if language == "yaml"]
    (tmp_path / "configs" / "tasks").mkdir(parents=True)
    (tmp_path / "configs" / "tasks" / "mine.yaml").write_text(mine, encoding="utf-8")
    return tmp_path


def test_the_readme_has_commands():
    assert len(TRAININGS) >= 1
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize("command", [*TRAININGS, "mtl train --config-dir configs tasks=mine"])
def test_every_training_command_runs(users_folder, tiny_folder, command):
    assert command in README
    small = ["max_steps=1", "batch_size=4", "max_eval_examples=2", "max_test_examples=2", "output_dir=run"]
    assert main([*shlex.split(command)[1:], f"model.name_or_path={tiny_folder}", *small]) == 0
    assert json.loads((users_folder / "run" / "results.json").read_text(encoding="utf-8"))["schema"] == 1


def test_every_command_of_the_handing_over_runs(users_folder, tiny_folder, monkeypatch):
    section = README.split("## Handing over")[1].split("## ")[0]
    commands = [line.partition("#")[0] for line in section.splitlines() if line.startswith("mtl ")]
    assert {command.split()[1] for command in commands} == {"export", "eval", "predict", "chat"}
    tasks = ["tasks.greetings.path=data/greetings.jsonl", "tasks.colours.path=data/colours.jsonl"]
    small = ["max_steps=1", "batch_size=4", "max_eval_examples=2", "max_test_examples=2", "output_dir=outputs/mine"]
    assert main(["train", "tasks=none", *tasks, f"model.name_or_path={tiny_folder}", *small]) == 0
    (users_folder / "data" / "new.jsonl").write_text('{"prompt": "Is colour 99 warm?"}\n', encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("good morning\n"))
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    for folder in ("adapter/greetings", "adapter/colours", "merged/greetings", "gguf-ready/greetings", "adapter/both"):
        assert (users_folder / "outputs" / "mine" / "exports" / folder / "README.md").is_file()


def test_the_row_formats_are_read(users_folder, tiny_folder):
    [rows] = [block for language, block in BLOCKS if not language and block.startswith('{"prompt"')]
    for number, row in enumerate(rows.splitlines()):
        path = users_folder / "data" / f"format{number}.jsonl"
        path.write_text("".join(numbered(row, i) + "\n" for i in range(9)), encoding="utf-8")
    tasks = [f"tasks.f{number}.path=data/format{number}.jsonl" for number in range(len(rows.splitlines()))]
    small = ["max_steps=1", "batch_size=4", "max_eval_examples=1", "max_test_examples=1", "output_dir=run"]
    assert main(["train", "tasks=none", *tasks, f"model.name_or_path={tiny_folder}", *small]) == 0


def numbered(row, number):
    """The row with another prompt, since equal prompts are never divided between splits."""
    for words in ("good morning", "plain text"):
        row = row.replace(words, f"{words} {number}")
    return row.replace('"..."', f'"... {number}"')


def test_the_python_example_runs():
    import torch

    [code] = [block for language, block in BLOCKS if language == "python"]
    names = {"gramian": torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)}
    exec(code, names)
    counts = names["Temperature"](sizes=[100, 1000, 10000], temperature=2.0, seed=0).counts(16)
    assert sum(counts) == 16


def test_the_levers_are_those_there_are():
    text = README.split("## The levers")[1].split("## ")[0]
    group = ""
    table, prose = text.split("These are the ones to begin with")
    for line in table.splitlines():
        if found := re.match(r"\| (\w*) ?\| `(\w+)`", line):
            group = found[1] or group
            assert (config_dir() / group / f"{found[2]}.yaml").is_file(), line
    numbers = [
        len(list((config_dir() / group).glob("*.yaml"))) for group in ("sampler", "weighter", "surgery", "adapters")
    ]
    assert [int(number) for number in re.findall(r"\b\d+\b", prose.split("mtl strategies")[0])] == numbers
    presets = re.search(r"strategy=([\w|]+)`", README)[1].split("|")
    assert sorted(presets) == sorted(file.stem for file in (config_dir() / "strategy").glob("*.yaml"))


def test_the_table_of_launches_has_every_option():
    table = README.split("| launch | |")[1].split("\n\n")[0]
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert sorted(named) == sorted(file.stem for file in (config_dir() / "launch").glob("*.yaml"))


def test_the_metrics_are_those_there_are():
    sentence = README.split("Metrics are ")[1].split("all scores")[0]
    named = set(re.findall(r"`(\w+)`", sentence))
    assert named == set(METRICS) - {"none"}


def test_files_it_names_exist():
    for place in re.findall(r"^((?:mtl|conf|experiments|tests)/[\w/.]*)", README, re.MULTILINE):
        assert (ROOT / place).exists(), place
    for place in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / place).exists(), place
