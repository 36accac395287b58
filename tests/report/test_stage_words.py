"""What the report says of stages, whole."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mtl.errors import UserError
from mtl.report.stage_words import MAX_RUNS, stage_sentences

JOINT = {"stage": "joint", "tasks": ["a", "b", "c"], "steps": 4}
WEAK = {
    "stage": "weak",
    "tasks": ["a", "b"],
    "weakness": {"by": "loss_ratio", "tasks": {"a": 0.912, "b": 0.7, "c": 0.1}},
}


def run(*stages, seed=0):
    return SimpleNamespace(strategy="pcgrad", seed=seed, results=SimpleNamespace(stages=stages))


def guard(harmed, scale):
    return {**WEAK, "guard": {"action": "interpolate", "harmed": harmed, "drops": {}, "scale": scale}}


def test_stages_in_words():
    trained = "stage weak: trained a (0.91), b (0.70), weakest by loss_ratio on validation data."
    assert stage_sentences([run(JOINT)]) == []
    assert stage_sentences([run(JOINT, WEAK, seed=2)]) == [f"pcgrad, seed 2, {trained}"]
    assert stage_sentences([run(JOINT, guard({}, 1.0))]) == [
        f"pcgrad, seed 0, {trained} No other task fell too far there."
    ]
    assert stage_sentences([run(JOINT, guard({"c": 0.0712}, 0.25))]) == [
        f"pcgrad, seed 0, {trained} There c by 0.071 fell too far, so 25% of its change is kept."
    ]
    assert stage_sentences([run(JOINT, guard({"c": 0.5}, 0.0))])[0].endswith("fell too far, so it was rolled back.")
    skipped = {"stage": "weak", "tasks": [], "steps": 0, "skipped": "no task is weak by weakness=target"}
    assert stage_sentences([run(skipped)]) == [
        "pcgrad, seed 0, stage weak: skipped, no task is weak by weakness=target."
    ]


def test_of_many_runs_the_first_ones_are_told():
    found = stage_sentences([run(WEAK, seed=seed) for seed in range(MAX_RUNS + 3)])
    assert len(found) == MAX_RUNS + 1
    assert found[-1] == "3 more runs have such stages; their results.json says what became of them."


@pytest.mark.parametrize("record", [1, {"weakness": 3, "stage": "weak", "tasks": ["a"]}, {"guard": [1], "tasks": []}])
def test_damaged_records_are_refused(record):
    run = SimpleNamespace(strategy="x", seed=0, folder=Path("run"), results=SimpleNamespace(stages=[record]))
    with pytest.raises(UserError, match=r"run/results\.json: stages must be what a run has written, found: "):
        stage_sentences([run])
