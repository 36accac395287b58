from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtl.reporting.tensorboard import flatten, hyperparameters


@pytest.mark.parametrize(
    ("config", "flat"),
    [
        ({"a": {"b": {"c": 1}}, "d": 0.5}, {"a.b.c": 1, "d": 0.5}),
        ({"a": (1, None, "情")}, {"a": '[1, null, "情"]'}),
        ({"a": False, "b": None, "c": {}}, {"a": "false", "b": "null"}),
        ({1: Path("x")}, {"1": "x"}),
        ({"a": {"_target_": "x.y.Z", "_partial_": True, "b": {"_target_": "W"}}}, {"a": "Z", "a.b": "W"}),
    ],
)
def test_flatten(config: dict[str, Any], flat: dict[str, Any]) -> None:
    assert flatten(config) == flat


LEVERS = {
    "sampler": {"_target_": "mtl.samplers.Equal"},
    "weighter": {"_target_": "mtl.weighters.RLW", "seed": 7},
    "surgery": {"_target_": "own.Mine"},
}


@pytest.mark.parametrize(
    ("run_name", "strategy"),
    [
        ("pcgrad,seed=1", "pcgrad"),
        ("seed=1,pcgrad", "pcgrad"),
        ("pcgrad,seed=1,learning_rate=0.001", "pcgrad,learning_rate=0.001"),
        ("weighter.seed=2,seed=1", "weighter.seed=2"),
        ("seed=1", "Equal, RLW, Mine"),
        (None, "Equal, RLW, Mine"),
    ],
)
def test_the_strategy_is_the_name_without_the_seed(run_name: str | None, strategy: str) -> None:
    assert hyperparameters({**LEVERS, "run_name": run_name})["Strategy"] == strategy


def test_what_cannot_differ_between_strategies_is_no_hyperparameter() -> None:
    config = LEVERS | {
        "seed": 1,
        "run_name": "x",
        "output_dir": "out",
        "micro_batch_tokens": 64,
        "tasks": {"a": {"path": "p", "metric": "accuracy"}},
        "launch": {"num_processes": 2},
        "stage_order": ["joint", "weak"],
        "stages": {"joint": {"max_steps": 3}},
    }
    assert hyperparameters(config) == {
        "Strategy": "x",
        "stages": "joint+weak",
        "seed": "1",
        "sampler": "Equal",
        "weighter": "RLW",
        "weighter.seed": 7,
        "surgery": "Mine",
        "stages.joint.max_steps": 3,
    }
