from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

import mtl.samplers

FOLDER = Path(__file__).parents[2] / "conf" / "sampler"
NAMES = ["a", "情感 😀"]
SUPPLIED = {"sizes": [20, 40_000], "names": NAMES, "seed": 3, "num_steps": 10, "batch_size": 64}
# What the user must say.
REQUIRED: dict[str, dict[str, Any]] = {
    "specified": {"probabilities": {"情感 😀": 3, "a": 1}},
    "doremi": {"references": {"情感 😀": 1.5, "a": 0.2}},
}


def supplied_to(config: Any) -> dict[str, Any]:
    parameters = inspect.signature(hydra.utils.get_class(config["_target_"])).parameters
    return {key: value for key, value in SUPPLIED.items() if key in parameters}


def test_every_class_has_one_option_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {name.lower() for name in mtl.samplers.__all__}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_option_file_spells_out_every_default(path: Path) -> None:
    config = OmegaConf.load(path)
    parameters = inspect.signature(hydra.utils.get_class(config["_target_"])).parameters
    own = {name: p.default for name, p in parameters.items() if name not in SUPPLIED}
    written = {key: value for key, value in config.items() if not key.startswith("_")}
    required = {name for name, default in own.items() if default is inspect.Parameter.empty}
    assert required == REQUIRED.get(path.stem, {}).keys()
    assert written == own | {name: {} for name in required}
    config = OmegaConf.merge(config, REQUIRED.get(path.stem, {}))
    sampler = hydra.utils.instantiate(config)(**supplied_to(config))
    assert sampler.counts(64)[1] >= 32


@pytest.mark.parametrize("name", REQUIRED)
def test_what_the_user_must_say_is_asked_for(name: str) -> None:
    config = OmegaConf.load(FOLDER / f"{name}.yaml")
    (option,) = REQUIRED[name]
    with pytest.raises(ValueError, match=f"^{option}: must name every task, found nothing for 'a'; add it$"):
        hydra.utils.instantiate(config)(**supplied_to(config))


def test_infinite_temperature_and_targets_by_name_come_through_yaml() -> None:
    config = OmegaConf.create("{_target_: mtl.samplers.Temperature, _partial_: true, temperature: .inf}")
    assert hydra.utils.instantiate(config)(sizes=[20, 40_000]).probabilities == (0.5, 0.5)
    config = OmegaConf.merge(OmegaConf.load(FOLDER / "performance.yaml"), {"targets": {"情感 😀": 0.8}})
    hydra.utils.instantiate(config)(sizes=[20, 40_000], names=NAMES)


def test_nested_options_come_through_yaml() -> None:
    schedule = [{"until": 0.5, "weights": {"a": 1}}, {"until": 1, "weights": {"情感 😀": 3, "a": 1}}]
    config = OmegaConf.merge(OmegaConf.load(FOLDER / "curriculum.yaml"), {"schedule": schedule})
    assert hydra.utils.instantiate(config)(**supplied_to(config)).probabilities == (1.0, 0.0)
    config = OmegaConf.merge(OmegaConf.load(FOLDER / "curriculum.yaml"), {"order": NAMES[::-1]})
    assert hydra.utils.instantiate(config)(**supplied_to(config)).probabilities == (0.0, 1.0)
    config = OmegaConf.merge(OmegaConf.load(FOLDER / "skillit.yaml"), {"matrix": [[1, 0.5], [0, 1]]})
    assert hydra.utils.instantiate(config)(**supplied_to(config)).probabilities == (0.5, 0.5)
