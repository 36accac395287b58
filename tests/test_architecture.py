"""Data flows one way and imports follow it; a few things are allowed in one place only."""

import ast
import re
from pathlib import Path

import pytest

import mtl

PACKAGE = Path(mtl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A part may import those above it, and itself.
ORDER = [
    ("errors", "usage", "memo", "config_keys"),
    ("interfaces",),
    ("interrupt", "loss_scale"),
    ("tasks", "samplers", "weighters", "surgery", "distributed", "checkpoint", "construct", "overrides", "schema"),
    ("ranks", "zero"),
    ("launch", "mistakes"),
    ("data",),
    ("models",),
    ("gradients", "evaluation"),
    ("weak", "options"),
    ("stages",),
    ("reporting",),
    ("settings",),
    ("run", "resume"),
    ("conflict", "stage_parts", "guard"),
    ("step", "best"),
    ("trouble",),
    ("training",),
    ("prepare",),
    ("job",),
    ("composition",),
    ("sweep_folder",),
    ("start", "report", "merging", "handover"),
    ("sweep",),
    ("train", "strategies"),
    ("cli",),
]
LEVELS = {part: level for level, parts in enumerate(ORDER) for part in parts}
STRATEGIES = ("samplers", "weighters", "surgery")


def part_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_at_run_time(file):
    """Modules that a file imports, without those for type checkers only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    part = part_of(file)
    if part == "__init__":
        return
    for module in imports_at_run_time(file):
        if module.startswith("mtl."):
            imported = module.split(".")[1]
            assert imported == part or LEVELS[imported] < LEVELS[part], f"{part} imports {module}"


def test_strategies_see_tensors_and_numbers_only():
    allowed = {"errors", "interfaces"}
    for file in FILES:
        if part_of(file) in STRATEGIES:
            foreign = [m for m in imports_at_run_time(file) if re.match("mtl|transformers|peft|accelerate|hydra", m)]
            assert all(m.split(".")[1] in {*allowed, part_of(file)} for m in foreign), (file, foreign)


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        (r"^\s*(from|import) hydra", {"composition.py", "sweep.py", "train.py"}),
        # launch.py needs the exceptions of torch elastic, the agent that accelerate launch runs.
        (r"^\s*(from|import) torch\.distributed|\bdist\.", {"distributed.py", "launch.py"}),
        (r"^\s*(from|import) pickle|torch\.load\(|trust_remote_code=True", set()),
        (r"\bopen_dict\b|cfg\.get\(", set()),
    ],
)
def test_some_things_stand_in_one_place_only(pattern, allowed):
    found = {file.name for file in FILES if re.search(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)}
    assert found <= allowed


def test_files_and_functions_fit_the_eye():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 350, f"{file.name} is longer than two rooms"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 60, f"{file.name}: {node.name} has {lines} lines"
