from __future__ import annotations

import inspect
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

import mtl.weighters

FOLDER = Path(__file__).parents[2] / "conf" / "weighter"
SUPPLIED = {"num_tasks": 2, "names": ["a", "情感 😀"], "sizes": [20, 40_000], "seed": 3, "num_steps": 100}
GIVEN = {"excessdro": {"references": {"a": 0.2, "情感 😀": 1.0}}}  # what has no sensible default


def test_every_class_has_one_option_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {name.lower() for name in mtl.weighters.__all__}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_option_file_spells_out_every_default(path: Path) -> None:
    config = OmegaConf.load(path)
    parameters = inspect.signature(hydra.utils.get_class(config["_target_"])).parameters
    own = {name: p.default for name, p in parameters.items() if name not in SUPPLIED}
    written = {key: value for key, value in config.items() if not key.startswith("_")}
    assert written.keys() == own.keys()
    assert all(value == own[key] for key, value in written.items() if own[key] is not inspect.Parameter.empty)
    supplied = {key: SUPPLIED[key] for key in parameters if key in SUPPLIED} | GIVEN.get(path.stem, {})
    weighter = hydra.utils.instantiate(config)(**supplied)
    assert weighter.weights(None).mean() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("weights", [{"情感 😀": 2.0}, [1.0, 2.0]])
def test_static_weights_come_through_yaml(weights: object) -> None:
    config = OmegaConf.create({"_target_": "mtl.weighters.Static", "_partial_": True, "weights": weights})
    assert hydra.utils.instantiate(config)(names=SUPPLIED["names"]).weights(None).tolist() == [1.0, 2.0]
