"""The intervals of a comparison against a bootstrap of its own: other draws, plain means, the metrics' libraries."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from mtl.report.compare import compare
from mtl.report.runs import find_runs

SCORED = {"sentiment": "accuracy", "inflect": "exact_match"}


def answers_of(folder, task):
    lines = (folder / "predictions" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def ends(interval):
    return interval.low, interval.high


def bootstrap(scores, reference, *, num=6000, paired):
    """Relative changes over resamples [R, T] of examples and seeds. Arrays of examples' scores [S, N] by task."""
    rng = np.random.default_rng(99)
    num_seeds, num_reference = (len(next(iter(item.values()))) for item in (scores, reference))
    columns = {task: [] for task in scores}
    for _ in range(num):
        seeds = rng.integers(num_seeds, size=max(1, num_seeds - 1))
        other = seeds if paired else rng.integers(num_reference, size=max(1, num_reference - 1))
        for task, own in scores.items():
            examples = rng.integers(own.shape[1], size=own.shape[1] - 1)
            new, old = own[seeds][:, examples].mean(), reference[task][other][:, examples].mean()
            columns[task].append((new - old) / max(abs(old), 0.05))
    return np.array(list(columns.values())).T


@pytest.mark.parametrize("reference_seeds", [(0,), (0, 2, 10), (7, 8, 9)])
def test_intervals_are_those_of_another_bootstrap(make_run, tmp_path, reference_seeds):
    """Seed 10 comes before seed 2 in the order of the folders, and is paired all the same."""
    folders = [make_run("pcgrad", seed, tasks=SCORED, num_examples=60, skill=0.3 + 0.02 * seed) for seed in (0, 2, 10)]
    references = [
        make_run("equal", seed, folder=tmp_path / "single", tasks=SCORED, num_examples=60, skill=0.4 + 0.02 * seed)
        for seed in reference_seeds
    ]
    outcome = compare(find_runs(folders), find_runs([tmp_path / "single"])).strategies[0]
    scores, base = (
        {task: np.array([[line["score"] for line in answers_of(run, task)] for run in runs]) for task in SCORED}
        for runs in (folders, references)
    )
    changes_RT = bootstrap(scores, base, paired=reference_seeds == (0, 2, 10))
    expected = {"mean": changes_RT.mean(axis=1), "worst": changes_RT.min(axis=1)}
    expected |= dict(zip(SCORED, changes_RT.T, strict=True))
    found = {"mean": outcome.mean, "worst": outcome.worst} | {task: outcome.tasks[task].change for task in SCORED}
    for name, changes_R in expected.items():
        # Monte-Carlo errors of the ends of 999 and 6000 resamples: .09 and .03 standard deviations.
        np.testing.assert_allclose(
            ends(found[name]), np.quantile(changes_R, [0.025, 0.975]), atol=0.35 * changes_R.std(), err_msg=name
        )


def test_a_corpus_metric_is_scored_anew_in_each_resample(make_run):
    folder = make_run(tasks={"translate": "chrf"}, num_examples=15)
    lines = answers_of(folder, "translate")
    rng, scores = np.random.default_rng(5), []
    for _ in range(600):
        drawn = [lines[place] for place in rng.integers(15, size=14)]
        corpus = CHRF().corpus_score([line["answer"] for line in drawn], [[line["reference"] for line in drawn]])
        scores.append(corpus.score / 100)
    interval = compare(find_runs([folder])).strategies[0].tasks["translate"].score
    np.testing.assert_allclose(ends(interval), np.quantile(scores, [0.025, 0.975]), atol=0.5 * np.std(scores))
