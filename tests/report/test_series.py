"""Curves and conflict out of metrics.jsonl."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from mtl.errors import UserError
from mtl.report import series as module
from mtl.report.series import MAX_POINTS, Curve, Moments, mean_curve, mean_series, read_series

METRICS = {"a": "accuracy", "情感 😀": "loss"}


def step(number, **changes):
    values = {"p": {"a": 0.25, "情感 😀": 0.75}, "lambda": {"a": 1.0, "情感 😀": 1.0}, "w": None}
    return {"step": number, "stage": "joint", "loss": {"a": 1.0}, **values, **changes}


def evaluation(number, loss, **scores):
    return {
        "step": number,
        "stage": "joint",
        "eval": {"a": {**scores, "loss": loss}, "情感 😀": {"loss": loss}},
        "mean": {},
    }


def write(path, records, torn=b""):
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + torn)
    return path


def points(curve):
    return dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_small_run(file):
    write(
        file,
        [
            evaluation(0, 3.0),
            step(1, w={"a": 0.25, "情感 😀": 0.75}),
            step(2, p={"a": 0.5, "情感 😀": 0.5}, w={"a": 1.0}),
            evaluation(2, 2.0, accuracy=0.5, macro_f1=0.1),
        ],
    )
    series = read_series(file, METRICS)
    assert points(series.losses["a"]) == points(series.losses["情感 😀"]) == {0: 3.0, 2: 2.0}
    assert {name: points(curve) for name, curve in series.scores.items()} == {"a": {2: 0.5}}
    assert points(series.probabilities["a"]) == {1: 0.25, 2: 0.5}
    assert points(series.coefficients["a"]) == {1: 0.5, 2: 1.0}  # times the tasks present
    assert points(series.coefficients["情感 😀"]) == {1: 1.5}
    assert series.cosines == {}


def test_what_was_not_finite_is_nan(file):
    write(file, [evaluation(0, 3.0), step(1, w={"a": None, "情感 😀": 0.5}), evaluation(1, None, accuracy=None)])
    series = read_series(file, METRICS)
    for curves in (series.losses, series.scores, series.coefficients):
        assert math.isnan(curves["a"].values[-1])
    assert points(series.coefficients["情感 😀"]) == {1: 1.0}


def test_a_torn_last_line_is_left_out(file):
    write(file, [step(1), step(2)], torn=b'{"step": 3, "stage"')
    assert points(read_series(file, METRICS).probabilities["a"]) == {1: 0.25, 2: 0.25}


def test_an_empty_file(file):
    assert read_series(write(file, []), METRICS) == module.Series()


def test_a_damaged_line(file):
    write(file, [step(1), step(2)])
    file.write_bytes(file.read_bytes().replace(b'{"step": 2', b"[step: 2"))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: a line must be one JSON object"):
        read_series(file, METRICS)


@pytest.mark.parametrize(
    "record",
    [
        {"step": 1, "p": ["a"], "lambda": {}, "w": None},
        {"p": {"a": 0.5}},
        {"step": 1, "p": {"a": "high"}},
        {"step": 1, "eval": {"a": 0.5}},
        {"step": "x", "eval": {"a": {"loss": 0.5}}},
        {"step": 1, "p": {}, "conflict": {"tasks": ["a", "b"], "cosines": [[1.0]]}},
        {"step": 1, "p": {}, "conflict": {"tasks": ["a", "b"], "cosines": [[1.0], [1.0]]}},
        {"step": 1, "p": {}, "conflict": {"tasks": ["a"], "cosines": [[1e308]]}},
    ],
)
def test_lines_that_are_no_records(file, record):
    write(file, [record])
    with pytest.raises(
        UserError, match=r"metrics\.jsonl: must hold the records of a run, found: .*; there are no curves"
    ):
        read_series(file, METRICS)


def test_records_by_others(file):
    """Without white space, and with less in them."""
    records = [evaluation(0, 3.0), {"step": 1, "p": {"a": 0.5}}]
    file.write_bytes(b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records))
    series = read_series(file, METRICS)
    assert points(series.losses["a"]) == {0: 3.0}
    assert points(series.probabilities["a"]) == {1: 0.5}
    assert series.weights == series.coefficients == {}


def test_a_missing_file(file):
    with pytest.raises(UserError, match=r"metrics\.jsonl: must be a readable file, found: No such file"):
        read_series(file, METRICS)


@pytest.mark.parametrize("name", ["eval", "conflict"])
def test_tasks_called_like_keys(file, name):
    values = {"p": {name: 0.5}, "lambda": {name: 1.0}, "conflict": {"tasks": [name], "cosines": [[0.5]]}}
    write(file, [{"step": 0, "eval": {name: {"loss": 1.0}}}, step(1, **values)])
    series = read_series(file, {name: "loss"})
    assert (points(series.losses[name]), points(series.probabilities[name])) == ({0: 1.0}, {1: 0.5})
    assert series.cosines[name, name].mean == 0.5


@pytest.mark.parametrize(("num_steps", "num_kept"), [(199, 199), (200, 200), (201, 200), (5000, 200)])
def test_steps_are_thinned_evenly(file, num_steps, num_kept):
    write(file, [step(number) for number in range(1, num_steps + 1)])
    steps = read_series(file, METRICS).probabilities["a"].steps
    assert (len(steps), steps[0], steps[-1]) == (num_kept, 1, num_steps)
    assert np.ptp(np.diff(steps)) <= 1


def test_only_lines_that_are_kept_are_parsed(file, monkeypatch):
    records = [evaluation(0, 1.0)]
    for number in range(1, 2001):
        conflict = {"conflict": {"tasks": ["a"], "cosines": [[0.1]]}} if number % 2 else {}
        records += [step(number, **conflict), *([evaluation(number, 1.0)] if number % 100 == 0 else [])]
    write(file, records)
    parsed = []
    loads = json.loads
    monkeypatch.setattr(module.json, "loads", lambda line: parsed.append(line) or loads(line))
    series = read_series(file, METRICS)
    assert len(series.losses["a"].steps) == 21
    assert series.cosines["a", "a"].count == MAX_POINTS
    assert len(parsed) <= 2 * MAX_POINTS + 21


def test_cosines_add_up_to_mean_and_standard_error(file, tmp_path):
    values = np.random.default_rng(0).normal(0.1, 0.3, size=(7, 2, 2))
    matrices = [((value + value.T) / 2).tolist() for value in values]
    records = [step(i, conflict={"tasks": ["a", "b"], "cosines": matrix}) for i, matrix in enumerate(matrices)]
    whole = read_series(write(file, records), METRICS)
    parts = [
        read_series(write(tmp_path / f"{i}.jsonl", part), METRICS) for i, part in enumerate((records[:3], records[3:]))
    ]
    for series in (whole, mean_series(parts)):
        conflict = series.conflict(["b", "a"])
        reordered = np.array(matrices)[:, ::-1, ::-1]
        np.testing.assert_allclose(conflict.means_KK, reordered.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(conflict.standard_errors_KK, reordered.std(axis=0, ddof=1) / math.sqrt(7), rtol=1e-9)
        assert (conflict.counts_KK == 7).all()


def test_cosines_that_are_few_or_none(file):
    write(file, [step(1, conflict={"tasks": ["a", "b"], "cosines": [[0.5, None], [None, 0.25]]})])
    conflict = read_series(file, METRICS).conflict(["a", "b", "c"])
    assert conflict.counts_KK.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(conflict.means_KK.diagonal(), [0.5, 0.25, math.nan])
    assert np.isnan(conflict.standard_errors_KK).all()


def test_equal_measurements_have_no_error():
    moments = Moments()
    for _ in range(3):
        moments.add(Moments(1, 0.1, 0.1**2))
    assert moments.standard_error == pytest.approx(0, abs=1e-9)


def test_equal_steps_are_averaged_as_they_are():
    curves = [Curve(np.array([0.0, 10, 30]), np.array(values)) for values in ([1.0, 2, 3], [3.0, 2, 9])]
    assert points(mean_curve(curves)) == {0: 2.0, 10: 2.0, 30: 6.0}
    assert mean_curve(curves[:1]) is curves[0]


def test_other_steps_are_interpolated_and_the_shortest_ends_the_mean():
    long = Curve(np.array([0.0, 10, 20, 40]), np.array([0.0, 10, 20, 40]))
    short = Curve(np.array([0.0, 15, 30]), np.array([2.0, 17, 32]))
    assert points(mean_curve([long, short])) == {step: step + 1.0 for step in (0, 10, 15, 20, 30)}


def test_curves_without_a_common_step():
    assert points(mean_curve([Curve(np.array([1.0]), np.array([1.0])), Curve(np.array([2.0]), np.array([1.0]))])) == {}


def test_a_seed_that_diverged_is_not_averaged_away():
    steps = np.array([0.0, 1, 2])
    mean = mean_curve([Curve(steps, np.array([1.0, math.nan, 3])), Curve(steps, np.array([1.0, 2, 3]))])
    np.testing.assert_array_equal(mean.values, [1.0, math.nan, 3.0])


def test_a_mean_over_the_runs_that_have_the_task(make_run):
    runs = [
        read_series(make_run("x", seed, tasks={"a": None}).joinpath("metrics.jsonl"), {"a": "loss"}) for seed in (0, 1)
    ]
    runs.append(read_series(make_run("x", 2, tasks={"b": None}).joinpath("metrics.jsonl"), {"b": "loss"}))
    mean = mean_series(runs)
    np.testing.assert_allclose(mean.losses["a"].values, (runs[0].losses["a"].values + runs[1].losses["a"].values) / 2)
    np.testing.assert_array_equal(mean.losses["b"].values, runs[2].losses["b"].values)


@pytest.mark.slow
@pytest.mark.parametrize(("num_steps", "limit"), [(300, 5), (5000, 10)])
def test_the_speed_of_200_runs(make_run, num_steps, limit):
    tasks = {f"a task with a longer name {i}": None for i in range(10)}
    path = make_run(tasks=tasks, num_steps=num_steps, eval_every=60).joinpath("metrics.jsonl")
    assert path.stat().st_size > 1400 * num_steps
    start = time.process_time()
    for _ in range(200):
        read_series(path, dict.fromkeys(tasks, "loss"))
    assert time.process_time() - start < limit
