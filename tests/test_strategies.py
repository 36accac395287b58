"""``mtl strategies`` tells what there is, out of the code."""

import inspect
import re

import pytest

import mtl.samplers
import mtl.surgery
import mtl.weighters
from mtl.cli import main
from mtl.composition import config_dir
from mtl.strategies import LEVERS, option_in, options_of, written


def printed(capsys, *arguments):
    assert main(["strategies", *arguments]) == 0
    return capsys.readouterr().out


def test_every_option_of_every_lever_has_its_line(capsys):
    text = printed(capsys)
    for lever in LEVERS:
        section = re.split(rf"(?m)^{lever}$", text)[1]
        for file in (config_dir() / lever).glob("*.yaml"):
            (line,) = re.findall(rf"(?m)^  {file.stem} +(\S.+)$", section.split("\n\n")[0])
            assert line == file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def test_every_option_is_listed_with_its_parameters_and_defaults(capsys):
    lines = printed(capsys).splitlines()
    for lever in LEVERS:
        for option in options_of(lever):
            places = [place for place, line in enumerate(lines) if option.summary in line]
            assert len(places) == 1, option
            listed = lines[places[0] + 1].strip() if option.defaults else ""
            for key, value in option.defaults.items():
                assert f"{key}={written(value)}" in listed, option


def test_every_public_class_is_an_option():
    made_by_the_loop = {"Every", "Grouped", "GramianSurgery"}
    for lever, package in (("sampler", mtl.samplers), ("weighter", mtl.weighters), ("surgery", mtl.surgery)):
        classes = {name for name in package.__all__ if inspect.isclass(getattr(package, name))}
        assert {option.kind.__name__ for option in options_of(lever)} == classes - made_by_the_loop


def test_a_lever_shows_parameters_and_defaults(capsys):
    text = printed(capsys, "weighter")
    assert "weighter=gradnorm\n" in text
    assert "  weighter.alpha=1.5\n" in text
    assert "Source:" not in text


def test_an_option_is_explained_with_formula_source_and_arguments(capsys):
    text = printed(capsys, "surgery=cagrad")
    assert "  surgery.c=0.5\n  surgery.scale=mean\n" in text
    assert "Liu et al." in text
    assert "c: Radius around the mean" in text
    assert "weighter.num_tasks" not in printed(capsys, "weighter=rlw"), "the run supplies it"


def test_defaults_are_those_of_the_class():
    for lever in LEVERS:
        for option in options_of(lever):
            parameters = inspect.signature(option.kind).parameters
            for key, value in option.defaults.items():
                default = parameters[key].default
                if default is not inspect.Parameter.empty and lever in ("sampler", "weighter", "surgery"):
                    assert default in (value, None) or value == {}, (option.name, key)


@pytest.mark.parametrize("name", ["samplr", "surgery=pcgrd", "x"])
def test_an_unknown_name_is_one_line(capsys, name):
    assert main(["strategies", name]) == 2
    found = capsys.readouterr()
    assert not found.out
    assert found.err.startswith(f"mtl: error: {name}: there is no such lever or option.")
    assert found.err.count("\n") == 1
    assert ("Did you mean" in found.err) == (name != "x")


def test_an_option_file_of_nested_surgery_names_the_inner_class(capsys):
    assert "surgery.inner=<mtl.surgery.UPGrad>" in printed(capsys, "surgery=crmogm")
    assert option_in(config_dir() / "surgery" / "crmogm.yaml", "surgery").defaults["alpha"] == 0.9
