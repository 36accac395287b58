"""Resuming is exact whatever levers are combined."""

import itertools
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import mtl.composition
from mtl.errors import UserError

CONF = mtl.composition.config_dir()
GROUPS = ("sampler", "weighter", "surgery", "adapters", "stages")
TASKS = ("small", "middle", "large")
# What an option can't do without, or several ways of it that have states of their own.
VARIANTS = {
    "weighter=static": [["weighter.weights.small=3"]],
    "weighter=dwa": [["weighter.window_tokens=4"]],
    "weighter=excessdro": [[f"weighter.references.{task}=2.5" for task in TASKS]],
    "sampler=doremi": [[f"sampler.references.{task}=2.5" for task in TASKS]],
    "sampler=specified": [[f"sampler.probabilities.{task}={p}" for task, p in zip(TASKS, (5, 3, 2), strict=True)]],
    "sampler=performance": [[f"sampler.signal={signal}"] for signal in ("gap", "loss_ratio", "progress")],
    "sampler=exp3": [[f"sampler.reward={reward}"] for reward in ("loss_decrease", "gap_closed")],
    "surgery=pcgrad": [[], ["surgery_granularity=module"], ["surgery_every=2"]],
    "adapters=shared_and_per_task": [
        [],
        ["adapters.private_lora_dropout=0.2", "adapters.private_init_lora_weights=orthogonal"],
    ],
    "adapters=task_groups": [["adapters.groups.some=[small,large]"]],
}
UNINSTALLED = [] if find_spec("torchjd") else ["surgery=torchjd"]
PRIVATE_LAYOUTS = {f"adapters={name}" for name in ("per_task", "shared_and_per_task", "shared_a_per_task_b", "experts")}


def options_of(group):
    """All option files of a group, each with the overrides it takes."""
    options = sorted(f"{group}={file.stem}" for file in (CONF / group).glob("*.yaml"))
    return [[option, *extra] for option in options if option not in UNINSTALLED for extra in VARIANTS.get(option, [[]])]


def covering_array(factors, seed=0):
    """Cases in which each value of a factor meets each value of every other: greedy, with seeded random candidates."""
    generator = random.Random(seed)
    pairs = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(factors)), 2)
        for a in range(len(factors[i]))
        for b in range(len(factors[j]))
    }
    cases = []
    while pairs:
        first = min(pairs)
        best, covered = None, set()
        for _ in range(50):
            case = [generator.randrange(len(factor)) for factor in factors]
            for i, value in first:
                case[i] = value
            new = pairs & set(itertools.combinations(list(enumerate(case)), 2))
            if len(new) > len(covered):
                best, covered = case, new
        pairs -= covered
        cases.append([factor[value] for factor, value in zip(factors, best, strict=True)])
    return cases


def covering_each_once(factors):
    """The fewest cases in which every value occurs."""
    length = max(map(len, factors))
    return [[factor[case % len(factor)] for factor in factors] for case in range(length)]


FACTORS = [options_of(group) for group in GROUPS]
PAIRS = covering_array(FACTORS)
EACH_ONCE = covering_each_once(FACTORS)


def name_of(case):
    return "-".join("+".join(override.split("=")[-1] for override in option) for option in case)


def overrides_of(case):
    options = list(itertools.chain(*case))
    if "stages=weak_private" in options and not set(options) & PRIVATE_LAYOUTS:
        options.append("stages.weak_private.trainable=all")
    return [*options, "max_steps=2", "allow_ineffective=true"]


def test_the_arrays_cover_what_they_should():
    for i, j in itertools.combinations(range(len(FACTORS)), 2):
        met = {(str(case[i]), str(case[j])) for case in PAIRS}
        assert met == {(str(a), str(b)) for a in FACTORS[i] for b in FACTORS[j]}
    for i, factor in enumerate(FACTORS):
        assert {str(case[i]) for case in EACH_ONCE} == set(map(str, factor))
    assert len(PAIRS) < 2 * max(len(a) * len(b) for a, b in itertools.combinations(FACTORS, 2))


def check(case, tmp_path, command, interrupted_copy, outcome):
    levers = overrides_of(case)
    whole = command(tmp_path / "whole", *levers)
    two_stages = "stages=joint" not in levers
    step = 1 + sum(map(len, map(str, case))) % (3 if two_stages else 1)
    resumed = command(interrupted_copy(whole, step, tmp_path / "resumed"), *levers, "resume_from_checkpoint=auto")
    assert outcome(resumed) == outcome(whole)


@pytest.mark.parametrize("case", EACH_ONCE, ids=name_of)
def test_every_option(case, tmp_path, command, interrupted_copy, outcome):
    check(case, tmp_path, command, interrupted_copy, outcome)


@pytest.mark.full
@pytest.mark.parametrize("case", PAIRS, ids=name_of)
def test_all_pairs_of_options(case, tmp_path, command, interrupted_copy, outcome):
    check(case, tmp_path, command, interrupted_copy, outcome)


def test_all_pairs_of_options_compose(arguments, tmp_path):
    """Into settings whose parts are made, or into one line that says why not."""
    chosen = {
        (group, *option): mtl.composition.composed([*arguments, *option, "allow_ineffective=true"], None)[group]
        for group in GROUPS[:-1]
        for option in options_of(group)
    }
    config = mtl.composition.composed(arguments, None)
    for case in PAIRS:
        for group, option in zip(GROUPS[:-1], case, strict=False):
            config[group] = chosen[(group, *option)]
        config.allow_ineffective = True
        mtl.composition.settings_of(config, tmp_path)
        config.allow_ineffective = False
        try:
            mtl.composition.settings_of(config, tmp_path)
        except UserError as error:
            assert "loss weights act through it" in str(error), (case, error)


@pytest.mark.parametrize("case", EACH_ONCE[::12], ids=name_of)
def test_options_in_a_fresh_process(case, tmp_path, arguments, command, interrupted_copy, outcome):
    levers = overrides_of(case)
    whole = command(tmp_path / "whole", *levers)
    resumed = interrupted_copy(whole, 1, tmp_path / "resumed")
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "mtl.train",
            *arguments,
            f"output_dir={resumed}",
            *levers,
            "resume_from_checkpoint=auto",
        ],
        env={**os.environ, "PYTHONPATH": str(Path(mtl.composition.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert outcome(resumed) == outcome(whole)
