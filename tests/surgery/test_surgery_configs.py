from __future__ import annotations

import inspect
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

import mtl.surgery
from mtl.composition import maker
from mtl.construct import Maker

FOLDER = Path(__file__).parents[2] / "conf" / "surgery"
SUPPLIED = {"seed": 3, "names": ["a", "情感 😀"]}
MADE_BY_THE_LOOP = {"Every", "Grouped", "GramianSurgery"}


def test_every_class_has_one_option_file() -> None:
    classes = {name for name in mtl.surgery.__all__ if inspect.isclass(getattr(mtl.surgery, name))}
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {name.lower() for name in classes - MADE_BY_THE_LOOP}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_option_file_spells_out_every_default(path: Path) -> None:
    config = OmegaConf.load(path)
    parameters = inspect.signature(hydra.utils.get_class(config["_target_"])).parameters
    own = {name: parameter.default for name, parameter in parameters.items() if name not in SUPPLIED}
    written = {key: value for key, value in config.items() if not key.startswith("_")}
    assert written.keys() == own.keys()
    assert all(value == own[key] for key, value in written.items() if own[key] is not inspect.Parameter.empty)
    if path.stem == "torchjd":
        pytest.importorskip("torchjd")
    made: Maker = maker("surgery", config, SUPPLIED["names"])
    row = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(made(**SUPPLIED)(torch.stack([row, row])), row)
