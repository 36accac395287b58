"""The tasks that come with the package: disjoint, complete, small, and configured."""

from __future__ import annotations

import json
import unicodedata
from importlib import resources
from pathlib import Path

import pytest
import yaml

from mtl.data.sources import builtin_names, read_splits
from mtl.tasks.formats import parse_row
from mtl.tasks.task import Task

SUITE = Path(str(resources.files("mtl.tasks") / "suite"))
MANIFEST = json.loads((SUITE / "manifest.json").read_text(encoding="utf-8"))
CONFIGS = Path(__file__).parents[2] / "conf" / "tasks"


def normalised(prompt: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def configured(name: str) -> Task:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert list(config) == [name]
    return Task(name, **config[name])


def test_manifest_and_configs_list_the_same_tasks() -> None:
    assert builtin_names() == sorted(MANIFEST["tasks"])
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*MANIFEST["tasks"], "none"}
    assert yaml.safe_load((CONFIGS / "none.yaml").read_text(encoding="utf-8")) == {}


def test_suite_fits_a_git_repository() -> None:
    assert sum(path.stat().st_size for path in SUITE.rglob("*")) < 5_600_000


@pytest.mark.parametrize("name", builtin_names())
def test_rows_parse_are_counted_and_splits_are_disjoint(name: str) -> None:
    task = configured(name)
    splits = read_splits(task)
    assert {split: len(rows) for split, rows in splits.items()} == MANIFEST["tasks"][name]["counts"]
    assert len(splits["test"]) >= 50
    for rows in splits.values():
        for row in rows:
            parse_row(row.values, task, row.location)  # checks that the answer is among the labels or options
    prompts = {split: {normalised(row.values["prompt"]) for row in rows} for split, rows in splits.items()}
    assert not prompts["test"] & (prompts["train"] | prompts["val"])
    assert not prompts["val"] & prompts["train"]
    assert all(MANIFEST["tasks"][name][key] for key in ("type", "source", "licence"))


@pytest.mark.parametrize("name", ["quartz", "social_iqa"])
def test_options_are_those_that_the_prompt_names(name: str) -> None:
    for rows in read_splits(configured(name)).values():
        assert all(row.values["prompt"].endswith(": " + " / ".join(row.values["options"])) for row in rows)
