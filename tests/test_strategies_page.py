"""conf/README.md has a row for every option of the levers, and no other."""

import re
from pathlib import Path

import pytest

from mtl.cli import main
from mtl.strategies import LEVERS

CONF = Path(__file__).parents[1] / "conf"
PAGE = (CONF / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("lever", [*LEVERS, "stages"])
def test_every_option_has_a_row_with_all_its_cells(lever):
    section = re.split(r"(?m)^## ", PAGE.split(f"## {lever}\n")[1])[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    assert sorted(row[0].strip(" `") for row in rows) == sorted(file.stem for file in (CONF / lever).glob("*.yaml"))
    for row in rows:
        assert len(row) == 6, row
        assert all(cell.strip() for cell in row), row


def test_options_named_in_the_text_exist():
    text = PAGE.split("## sampler")[0]
    options = {file.stem for lever in LEVERS for file in (CONF / lever).glob("*.yaml")}
    for lever, choice in re.findall(r"(sampler|weighter|surgery)=(\w+)", text):
        assert (CONF / lever / f"{choice}.yaml").is_file(), (lever, choice)
    assert set(re.findall(r"`([a-z_0-9]+)`", text)) <= options


@pytest.mark.parametrize("command", re.findall(r"`mtl (strategies[^`]*)`", PAGE))
def test_commands_run(command, capsys):
    assert main(command.split()) == 0
    assert capsys.readouterr().out
