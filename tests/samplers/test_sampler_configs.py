from __future__ import annotations

import inspect
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

import mtl.samplers

FOLDER = Path(__file__).parents[2] / "conf" / "sampler"
SUPPLIED = {"sizes": [20, 40_000], "names": ["a", "情感 😀"], "seed": 3}


def test_every_class_has_one_option_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {name.lower() for name in mtl.samplers.__all__}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_option_file_spells_out_every_default(path: Path) -> None:
    config = OmegaConf.load(path)
    target = hydra.utils.get_class(config["_target_"])
    parameters = inspect.signature(target).parameters
    written = {key: value for key, value in config.items() if not key.startswith("_")}
    assert written == {name: p.default for name, p in parameters.items() if name not in SUPPLIED}
    sampler = hydra.utils.instantiate(config)(**{key: SUPPLIED[key] for key in parameters if key in SUPPLIED})
    assert sampler.counts(64)[1] >= 32


def test_infinite_temperature_and_targets_by_name_come_through_yaml() -> None:
    config = OmegaConf.create("{_target_: mtl.samplers.Temperature, _partial_: true, temperature: .inf}")
    assert hydra.utils.instantiate(config)(sizes=[20, 40_000]).probabilities == (0.5, 0.5)
    config = OmegaConf.merge(OmegaConf.load(FOLDER / "performance.yaml"), {"targets": {"情感 😀": 0.8}})
    hydra.utils.instantiate(config)(sizes=[20, 40_000], names=["a", "情感 😀"])
