from __future__ import annotations

import inspect
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from mtl.surgery import Mean, PCGrad

FOLDER = Path(__file__).parents[2] / "conf" / "surgery"
SUPPLIED = {"seed": 3}


def test_every_class_has_one_option_file() -> None:
    targets = {OmegaConf.load(path)["_target_"] for path in FOLDER.glob("*.yaml")}
    assert {"mtl.surgery.Mean", "mtl.surgery.PCGrad"} <= targets
    assert {hydra.utils.get_class(target) for target in targets} >= {Mean, PCGrad}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_option_file_spells_out_every_default(path: Path) -> None:
    config = OmegaConf.load(path)
    parameters = inspect.signature(hydra.utils.get_class(config["_target_"])).parameters
    written = {key: value for key, value in config.items() if not key.startswith("_")}
    assert written == {name: p.default for name, p in parameters.items() if name not in SUPPLIED}
    surgery = hydra.utils.instantiate(config)(**{key: SUPPLIED[key] for key in parameters if key in SUPPLIED})
    row = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(surgery(torch.stack([row, row])), row)
