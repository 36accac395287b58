"""The comparison against plain loops over the files of the runs."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict
from statistics import fmean

import numpy as np
import pytest
import yaml
from sacrebleu.metrics import BLEU, CHRF
from scipy.stats import rankdata
from sklearn.metrics import accuracy_score

from mtl.report.compare import BEFORE, compare
from mtl.report.runs import find_runs

SCORED = {"sentiment": "accuracy", "inflect": "exact_match"}
CHOICE = {"sentiment": "accuracy"}


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def answers_of(folder, task):
    lines = (folder / "predictions" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def score_of(folder, task):
    values = results_of(folder)["tasks"][task]
    return values["test"][values["metric"] or "loss"]


def change_of(score, reference):
    return (score - reference) / max(abs(reference), 0.05)


def answer_as(folder, right, task="sentiment"):
    """Lets a run answer these examples right and the others wrong."""
    lines = answers_of(folder, task)
    for line, is_right in zip(lines, right, strict=True):
        line["answer"] = line["reference"] if is_right else "wrong"
        line["score"] = float(is_right)
    path = folder / "predictions" / f"{task}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    results = results_of(folder)
    results["tasks"][task]["test"]["accuracy"] = fmean(map(float, right))
    (folder / "results.json").write_text(json.dumps(results))


def copy_as(folder, strategy):
    """The same run under another strategy."""
    copy = folder.with_name(folder.name.replace(folder.name.split(",")[0], strategy))
    shutil.copytree(folder, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | {"surgery": {"_target_": strategy}}))
    return copy


def set_losses(folder, test, base=2.5):
    results = results_of(folder)
    for task in results["tasks"].values():
        task["test"]["loss"], task["base"]["loss"] = test, base
    (folder / "results.json").write_text(json.dumps(results))


def compared(*folders, reference=()):
    return compare(find_runs(folders), find_runs(list(reference)) if reference else None)


def by_name(comparison):
    return {item.name: item for item in comparison.strategies}


def ends(interval):
    return interval.low, interval.high


@pytest.fixture
def suite(make_run):
    """Three strategies of three seeds on four tasks, one of which has only a loss, as folders by strategy."""
    skills = {"equal": 0.5, "pcgrad": 0.7, "rlw": {"sentiment": 0.9, "inflect": 0.2, "translate": 0.6, "notes": 0.6}}
    return {name: [make_run(name, seed, skill=skill) for seed in (0, 1, 2)] for name, skill in skills.items()}


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2), (7, 8)])
def test_everything_equals_plain_loops(suite, make_run, tmp_path, seeds):
    """Against single-task runs of one seed, of the same seeds, of others."""
    tasks = ["sentiment", "inflect", "translate", "notes"]
    single = {
        task: [make_run(f"only_{task}", seed, folder=tmp_path / "single", only_task=task) for seed in seeds]
        for task in tasks
    }
    comparison = compared(tmp_path / "runs", reference=[tmp_path / "single"])
    found = by_name(comparison)
    assert comparison.tasks == tasks
    assert comparison.metrics == dict(zip(tasks, ["accuracy", "exact_match", "chrf", "loss"], strict=True))
    assert comparison.reference_name == "single-task"

    means, changes, per_seed = {}, {}, {}
    for name, folders in suite.items():
        means[name], changes[name] = {}, {}
        per_seed[name] = dict.fromkeys((0, 1, 2), 0.0)
        for task in tasks:
            reference = fmean(score_of(folder, task) for folder in single[task])
            assert comparison.reference[task] == pytest.approx(reference)
            sign = -1 if task == "notes" else 1
            means[name][task] = fmean(score_of(folder, task) for folder in folders)
            changes[name][task] = sign * change_of(means[name][task], reference)
            for seed, folder in enumerate(folders):
                per_seed[name][seed] += sign * change_of(score_of(folder, task), reference) / len(tasks)
                assert found[name].tasks[task].per_seed[seed] == score_of(folder, task)
            outcome = found[name].tasks[task]
            assert outcome.score.value == pytest.approx(means[name][task])
            assert outcome.change.value == pytest.approx(changes[name][task])
            assert outcome.difference.value == pytest.approx(means[name][task] - reference)
            assert outcome.loss == pytest.approx(
                fmean(results_of(folder)["tasks"][task]["test"]["loss"] for folder in folders)
            )
            assert outcome.hurt == (outcome.change.high < 0)
    ranks = np.mean(
        [rankdata([means[name][task] * (1 if task == "notes" else -1) for name in suite]) for task in tasks], axis=0
    )
    points = {name: (fmean(own.values()), min(own.values())) for name, own in changes.items()}
    for name, rank in zip(suite, ranks, strict=True):
        assert (found[name].mean.value, found[name].worst.value) == pytest.approx(points[name])
        assert found[name].worst_task == min(changes[name], key=changes[name].get)
        assert found[name].per_seed_mean == pytest.approx(per_seed[name])
        assert found[name].mean_rank == pytest.approx(rank)
        assert found[name].on_pareto_front != any(
            other != points[name] and other[0] >= points[name][0] and other[1] >= points[name][1]
            for other in points.values()
        )
        assert found[name].num_below == sum(change < 0 for change in changes[name].values())
    assert [item.name for item in comparison.strategies] == sorted(points, key=lambda name: -points[name][0])
    assert [verdict.best for verdict in comparison.verdicts] == [
        max(points, key=lambda name, place=place: points[name][place]) for place in (0, 1)
    ]


def test_scores_are_those_of_the_libraries(make_run):
    tasks = {"sentiment": "accuracy", "to_en": "chrf", "sql": "bleu"}
    folder = make_run(tasks=tasks)
    outcome = compared(folder).strategies[0].tasks
    texts = {
        task: [[line[key] for line in answers_of(folder, task)] for key in ("answer", "reference")] for task in tasks
    }
    answers, references = texts["sentiment"]
    assert outcome["sentiment"].score.value == pytest.approx(accuracy_score(references, answers))
    for task, metric in (("to_en", CHRF()), ("sql", BLEU())):
        answers, references = texts[task]
        assert outcome[task].score.value == pytest.approx(metric.corpus_score(answers, [references]).score / 100)


@pytest.mark.parametrize("reference", [True, False])
def test_strategies_with_the_same_answers_are_not_told_apart(make_run, tmp_path, reference):
    for seed in (0, 1, 2):
        copy_as(make_run("equal", seed, tasks=SCORED), "twin")
        make_run("alone", seed, folder=tmp_path / "single", tasks=SCORED)
    comparison = compared(tmp_path / "runs", reference=[tmp_path / "single"] if reference else [])
    for verdict in comparison.verdicts:
        (duel,) = verdict.duels
        assert (duel.difference.value, *ends(duel.difference)) == (0, 0, 0)
        assert (duel.p_adjusted, duel.sign_flip_p, duel.decided) == (1, 1, False)
    first, second = comparison.strategies
    assert (first.mean, first.mean_rank, first.on_pareto_front) == (second.mean, 1.5, True)
    assert second.on_pareto_front


def test_pairing_by_example_tells_apart_what_differs_in_few_examples(make_run):
    """Right in 6 of 40 more, the same 6 of each seed: unpaired intervals, of 15 points to each side, would hold 0."""
    for seed in (0, 1, 2):
        folder = make_run("equal", seed, tasks=CHOICE, num_examples=40)
        right = [place % 2 == 0 for place in range(40)]
        copy = copy_as(folder, "better")
        answer_as(folder, right)
        answer_as(copy, [is_right or place in (1, 3, 5, 7, 9, 11) for place, is_right in enumerate(right)])
    comparison = compared(folder.parent)
    verdict = comparison.verdicts[0]
    (duel,) = verdict.duels
    assert (verdict.best, duel.other, duel.decided, duel.num_seeds) == ("better", "equal", True, 3)
    assert duel.difference.value == pytest.approx(0.15)
    assert 0 < duel.difference.low < 0.1 < 0.2 < duel.difference.high
    assert duel.p_adjusted <= 0.01
    assert duel.sign_flip_p == 0.25
    better, equal = comparison.strategies
    assert better.mean.low < equal.mean.high  # each by itself they overlap


def test_better_in_every_example_and_seed_is_decided(make_run):
    folders = [make_run(name, seed, tasks=CHOICE) for name in ("bad", "good") for seed in range(6)]
    for folder in folders:
        answer_as(folder, [folder.name.startswith("good")] * 20)
    for verdict in compared(*folders).verdicts:
        (duel,) = verdict.duels
        assert (verdict.best, duel.decided, *ends(duel.difference)) == ("good", True, 1, 1)
        assert (duel.p_adjusted, duel.sign_flip_p) == (2 / 1000, 2 / 2**6)


def test_a_clear_winner_among_many_is_decided(make_run):
    """Half of 40 examples right and all but one: Holm's factor over 29 others must not hide it."""
    first = make_run("other_0", 0, tasks=CHOICE, num_examples=40)
    answer_as(first, [place % 2 == 0 for place in range(40)])
    for number in range(1, 29):
        copy_as(first, f"other_{number}")
    answer_as(copy_as(first, "winner"), [place != 1 for place in range(40)])
    for verdict in compared(first.parent).verdicts:
        assert (verdict.best, len(verdict.duels)) == ("winner", 29)
        assert all(duel.decided and 0 < duel.p_adjusted < 1e-3 for duel in verdict.duels)


def test_p_of_several_duels_is_adjusted_by_holm(make_run):
    skills = {"a": 0.6, "b": 0.5, "c": 0.45}
    folders = {name: make_run(name, 0, tasks=CHOICE, skill=skill, num_examples=60) for name, skill in skills.items()}
    for verdict in compared(*folders.values()).verdicts:
        pairs = [compared(folders[verdict.best], folders[duel.other]).verdicts[0].duels[0] for duel in verdict.duels]
        low, high = sorted(duel.p_adjusted for duel in pairs)
        assert low < 0.5
        expected = [min(1, 2 * low), max(min(1, 2 * low), high)]
        assert sorted(duel.p_adjusted for duel in verdict.duels) == pytest.approx(expected)


def test_sign_flips_by_enumeration(make_run):
    for name, skill in (("a", 0.6), ("b", 0.5)):
        for seed in range(5):
            make_run(name, seed, tasks=CHOICE, skill=skill)
    folders = make_run("c", 0, tasks=CHOICE).parent
    comparison = compared(folders)
    verdict, scores = comparison.verdicts[0], by_name(comparison)
    for duel in verdict.duels:
        common = sorted(set(scores[verdict.best].per_seed_mean) & set(scores[duel.other].per_seed_mean))
        assert duel.num_seeds == len(common)
        differences = [
            scores[verdict.best].per_seed_mean[seed] - scores[duel.other].per_seed_mean[seed] for seed in common
        ]
        sums = [sum(np.multiply(signs, differences)) for signs in itertools.product((1, -1), repeat=len(common))]
        as_far = [abs(total) >= abs(sum(differences)) - 1e-9 for total in sums]
        assert duel.sign_flip_p == (pytest.approx(fmean(as_far)) if len(common) > 1 else None)


def test_without_a_reference_there_are_scores_and_no_changes(make_run):
    folders = [make_run(name, 0, tasks=SCORED) for name in ("equal", "pcgrad")]
    comparison = compared(*folders)
    assert (comparison.reference_name, comparison.reference) == (None, {})
    assert "without --reference there is no relative change; strategies are compared by their scores" in (
        comparison.notes
    )
    for folder in folders:
        outcome = by_name(comparison)[folder.name.split(",")[0]]
        scores = [score_of(folder, task) for task in SCORED]
        assert (outcome.mean.value, outcome.worst.value) == pytest.approx((fmean(scores), min(scores)))
        assert (outcome.num_hurt, outcome.num_below) == (0, 0)
        assert {task.change for task in outcome.tasks.values()} == {None}
        assert {task.p_adjusted for task in outcome.tasks.values()} == {None}


def test_losses_alone_are_compared_with_the_base_model(make_run):
    folders = {name: make_run(name, 0, tasks={"notes": None}) for name in ("low", "high")}
    set_losses(folders["low"], 2.0)
    set_losses(folders["high"], 3.0)
    comparison = compared(*folders.values())
    assert (comparison.reference_name, comparison.reference) == (BEFORE, {"notes": 2.5})
    assert [(item.name, item.mean.value) for item in comparison.strategies] == [("low", 0.2), ("high", -0.2)]
    assert [item.mean_rank for item in comparison.strategies] == [1, 2]
    assert comparison.strategies[0].tasks["notes"].difference.value == -0.5
    assert np.isnan(ends(comparison.strategies[0].mean)).all()
    assert not comparison.verdicts[0].duels[0].decided
    assert "only a loss, and not by example: notes; so the mean and the worst task have no intervals" in (
        comparison.notes
    )


def test_a_run_whose_loss_is_not_a_number_is_the_last(make_run):
    """Its place among the folders does not matter."""
    folders = [make_run(name, 0, tasks={"notes": None}) for name in ("a", "b", "c", "d")]
    for folder, loss in zip(folders, (None, 2.0, None, 1.0), strict=True):
        set_losses(folder, loss)
    for order in (folders, folders[::-1]):
        comparison = compared(*order)
        assert [item.name for item in comparison.strategies][:2] == ["d", "b"]
        assert [verdict.best for verdict in comparison.verdicts] == ["d", "d"]
        assert not any(item.on_pareto_front for item in comparison.strategies[2:])


def test_one_example_gives_no_interval(make_run):
    comparison = compared(*(make_run(name, 0, tasks=CHOICE, num_examples=1) for name in ("a", "b")))
    assert np.isnan([ends(item.mean) for item in comparison.strategies]).all()
    assert not comparison.verdicts[0].duels[0].decided


def test_seeds_that_others_lack_are_left_out_of_pairs(make_run):
    for name, seeds in {"a": (0, 1, 2), "b": (0, 1, 2), "c": (1, 5), "d": (8,)}.items():
        for seed in seeds:
            folder = make_run(name, seed, tasks=CHOICE, skill=0.9 if name == "a" else 0.4)
    comparison = compared(folder.parent)
    verdict = comparison.verdicts[0]
    assert verdict.best == "a"
    assert {duel.other: duel.num_seeds for duel in verdict.duels} == {"b": 3, "c": 1, "d": 0}
    assert {duel.other: duel.sign_flip_p is None for duel in verdict.duels} == {"b": False, "c": True, "d": True}
    scores = by_name(comparison)
    only = next(duel for duel in verdict.duels if duel.other == "c")
    assert only.difference.value == pytest.approx(scores["a"].per_seed_mean[1] - scores["c"].per_seed_mean[1])
    assert (
        "not all strategies have the seeds 0, 1, 2: c has 1, 5; d has 8; pairs are compared over the seeds they share"
    ) in comparison.notes


def test_what_a_reference_of_one_seed_can_not_say(make_run, tmp_path):
    for seed in (0, 1):
        make_run("equal", seed, tasks=CHOICE)
        make_run("alone", seed, folder=tmp_path / "two", tasks=CHOICE)
    make_run("alone", 0, folder=tmp_path / "one", tasks=CHOICE)
    note = "alone has one seed: its own spread over seeds is in no interval"
    assert note in compared(tmp_path / "runs", reference=[tmp_path / "one"]).notes
    assert note not in compared(tmp_path / "runs", reference=[tmp_path / "two"]).notes


def test_references_near_zero_are_named_in_one_line(make_run, tmp_path):
    tasks = {f"task_{place}": "exact_match" for place in range(7)}
    make_run("equal", 0, tasks=tasks)
    make_run("alone", 0, folder=tmp_path / "single", tasks=tasks, skill=dict.fromkeys(tasks, 0.0) | {"task_1": 1.0})
    (note,) = [text for text in compared(tmp_path / "runs", reference=[tmp_path / "single"]).notes if "below" in text]
    assert note == (
        "the reference is below 0.05 in task_0 (0.000), task_2 (0.000), task_3 (0.000), task_4 (0.000), task_5 (0.000) "
        "and 1 more: changes are divided by 0.05 there, and may dominate the mean"
    )


def test_several_models_are_marked(make_run):
    folders = [make_run(name, 0, tasks=CHOICE) for name in ("equal", "pcgrad")]
    assert not any("models" in note for note in compared(*folders).notes)
    (folders[1] / "results.json").write_text(json.dumps(results_of(folders[1]) | {"model": "larger"}))
    assert (
        "the runs are of several models, made up, larger: the scores before training are those of made up, and losses "
        "per token compare only where the tokenizer is the same"
    ) in compared(*folders).notes


def test_the_order_of_the_folders_does_not_matter(suite):
    folders = list(itertools.chain(*suite.values()))
    forward = compared(*folders, reference=suite["equal"])
    backward = compared(*folders[::-1], reference=suite["equal"][::-1])
    assert forward.reference_name == "equal"
    for name, item in by_name(forward).items():
        for task, outcome in item.tasks.items():
            np.testing.assert_equal(asdict(outcome), asdict(by_name(backward)[name].tasks[task]))
    equal = by_name(forward)["equal"]
    assert {task.change.value for task in equal.tasks.values()} == {0}  # against itself
    assert ends(equal.tasks["sentiment"].change) == (0, 0)


def test_a_single_strategy_has_no_verdict(make_run):
    comparison = compared(make_run(tasks=CHOICE))
    assert (comparison.verdicts, len(comparison.strategies)) == ([], 1)
    assert "with one seed, intervals say nothing of how another seed would have turned out" in comparison.notes
