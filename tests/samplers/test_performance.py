from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from mtl.interfaces import TaskFeedback
from mtl.samplers import Performance

SIZES = [100, 400, 900]
NO_LOSSES = torch.zeros(0)


def trained(losses: dict[int, float], step: int = 0, **extra: Any) -> TaskFeedback:
    return TaskFeedback(
        step, list(losses), [1] * len(losses), torch.tensor(list(losses.values()), dtype=torch.float64), **extra
    )


def evaluated(scores: dict[int, float | None], loss: float = 1.0) -> TaskFeedback:
    results = {
        task: {"loss": loss} if score is None else {"loss": loss, "score": score} for task, score in scores.items()
    }
    return TaskFeedback(0, [], [], NO_LOSSES, validation=results)


def test_starts_from_the_square_root_of_the_sizes() -> None:
    np.testing.assert_allclose(Performance(SIZES, floor=0.0).probabilities, [1 / 6, 2 / 6, 3 / 6], rtol=1e-14)


def test_gap_golden() -> None:
    sampler = Performance(SIZES, floor=0.0)
    sampler.update(evaluated({0: 0.9, 1: 0.5, 2: 0.6}))
    np.testing.assert_allclose(sampler.probabilities, [0.1, 0.5, 0.4], rtol=1e-14)


def test_floor_is_spread_evenly() -> None:
    sampler = Performance(SIZES, floor=0.3)
    sampler.update(evaluated({0: 1.0, 1: 0.5, 2: 0.5}))
    np.testing.assert_allclose(sampler.probabilities, [0.1, 0.45, 0.45], rtol=1e-14)
    assert Performance(SIZES, floor=1.0).probabilities == pytest.approx([1 / 3] * 3)


def test_exponent_concentrates_on_the_weakest() -> None:
    sampler = Performance(SIZES, floor=0.0, exponent=2.0)
    sampler.update(evaluated({0: 0.8, 1: 0.6, 2: 1.0}))
    np.testing.assert_allclose(sampler.probabilities, [0.2, 0.8, 0.0], rtol=1e-14)


def test_targets_by_name_and_for_all() -> None:
    scores = evaluated({0: 0.5, 1: 0.5, 2: 0.5})
    by_name = Performance(SIZES, names=["a", "情感", "c"], targets={"情感": 0.75, "a": 0.4}, floor=0.0)
    by_name.update(scores)
    np.testing.assert_allclose(by_name.probabilities, [0.0, 1 / 3, 2 / 3], rtol=1e-14)
    for_all = Performance(SIZES, targets=0.6, floor=0.0)
    for_all.update(evaluated({0: 0.5, 1: 0.3, 2: 0.6}))
    np.testing.assert_allclose(for_all.probabilities, [0.25, 0.75, 0.0], rtol=1e-14)


def test_no_gap_left_is_uniform() -> None:
    sampler = Performance(SIZES, targets=0.5)
    sampler.update(evaluated({0: 0.5, 1: 0.9, 2: 1.0}))
    np.testing.assert_allclose(sampler.probabilities, [1 / 3] * 3, rtol=1e-14)


def test_task_without_a_score_has_the_mean_gap() -> None:
    sampler = Performance(SIZES, floor=0.0)
    sampler.update(evaluated({0: 0.8, 1: None, 2: 0.4}))
    np.testing.assert_allclose(sampler.probabilities, [0.2 / 1.2, 0.4 / 1.2, 0.6 / 1.2], rtol=1e-14)


def test_losses_alone_leave_the_start() -> None:
    sampler = Performance(SIZES)
    before = sampler.probabilities
    sampler.update(evaluated({0: None, 1: None, 2: None}, loss=3.0))
    sampler.update(trained({0: 1.0, 2: 5.0}))
    assert sampler.probabilities == before


def test_newest_score_counts_and_others_stay() -> None:
    sampler = Performance(SIZES, floor=0.0)
    sampler.update(evaluated({0: 0.0, 1: 0.5, 2: 0.6}))
    sampler.update(evaluated({0: 0.9}))
    np.testing.assert_allclose(sampler.probabilities, [0.1, 0.5, 0.4], rtol=1e-14)


def test_scores_that_come_with_a_training_step_count() -> None:
    sampler = Performance(SIZES, floor=0.0)
    sampler.update(trained({0: 1.0}, validation={t: {"loss": 1.0, "score": s} for t, s in enumerate((0.9, 0.5, 0.6))}))
    np.testing.assert_allclose(sampler.probabilities, [0.1, 0.5, 0.4], rtol=1e-14)


def test_loss_ratio_golden() -> None:
    sampler = Performance(SIZES, signal="loss_ratio", floor=0.0, smoothing=0.5)
    assert sampler.probabilities == pytest.approx([1 / 3] * 3)
    sampler.update(trained({0: 2.0, 1: 4.0}))  # the first loss is its own reference, so that the ratio is 1
    np.testing.assert_allclose(sampler.probabilities, [1 / 3] * 3, rtol=1e-14)
    sampler.update(trained({0: 1.0}))
    ratio = (0.25 * 2.0 + 0.5 * 1.0) / 0.75 / 2.0
    np.testing.assert_allclose(sampler.probabilities, np.array([ratio, 1, 1]) / (ratio + 2), rtol=1e-14)


def test_loss_ratio_refers_to_the_evaluation_before_training() -> None:
    sampler = Performance(SIZES, signal="loss_ratio", floor=0.0, smoothing=0.0)
    sampler.update(evaluated({0: None, 1: 0.5, 2: None}, loss=4.0))
    np.testing.assert_allclose(sampler.probabilities, [1 / 3] * 3, rtol=1e-14)
    sampler.update(trained({0: 1.0, 1: 2.0, 2: 5.0}))
    np.testing.assert_allclose(sampler.probabilities, np.array([1, 2, 5]) / 8, rtol=1e-14)
    sampler.update(evaluated({0: None, 1: 0.5, 2: None}, loss=0.1))  # a later evaluation is no new reference
    np.testing.assert_allclose(sampler.probabilities, np.array([1, 2, 5]) / 8, rtol=1e-14)


def test_an_evaluation_during_training_is_no_reference() -> None:
    sampler = Performance([1, 1], signal="loss_ratio", floor=0.0)
    sampler.update(trained({0: 2.0}, validation={1: {"loss": 8.0}}))
    sampler.update(trained({1: 2.0}))
    np.testing.assert_allclose(sampler.probabilities, [0.5, 0.5], rtol=1e-14)


def test_constant_loss_has_ratio_1_from_the_first_step_on() -> None:
    sampler = Performance([1, 1], signal="loss_ratio", floor=0.0, smoothing=0.99)
    for _ in range(5):
        sampler.update(trained({0: 3.0}))
        np.testing.assert_allclose(sampler.probabilities, [0.5, 0.5], rtol=1e-12)


def test_vanishing_base_loss_stays_finite() -> None:
    sampler = Performance([1, 1], signal="loss_ratio", floor=0.1)
    sampler.update(trained({0: 0.0, 1: 0.0}))
    np.testing.assert_allclose(sampler.probabilities, [0.5, 0.5])
    sampler.update(trained({0: 1e-4}))
    assert np.isfinite(sampler.probabilities).all()


def progress_of(*evaluations: tuple[int, dict[int, dict[str, float]]], **options: Any) -> Performance:
    sampler = Performance(SIZES, signal="progress", floor=0.0, **options)
    for step, results in evaluations:
        sampler.update(TaskFeedback(step, [], [], NO_LOSSES, validation=results))
    return sampler


def results_of(scores: list[float], losses: list[float]) -> dict[int, dict[str, float]]:
    return {task: {"loss": loss, "score": score} for task, (loss, score) in enumerate(zip(losses, scores, strict=True))}


def test_progress_golden() -> None:
    """Slopes by least squares through (0, y), (10, y), (30, y); falling scores count like rising ones."""
    steps, scores_KT = [0, 10, 30], np.array([[0.1, 0.9, 0.5], [0.2, 0.7, 0.5], [0.5, 0.4, 0.5]])
    sampler = progress_of(*((s, results_of(row.tolist(), [1, 1, 1])) for s, row in zip(steps, scores_KT, strict=True)))
    slopes_T = np.abs(np.polyfit(steps, scores_KT, 1)[0])
    np.testing.assert_allclose(sampler.signals["progress"], slopes_T, atol=1e-15)
    np.testing.assert_allclose(sampler.probabilities, slopes_T / slopes_T.sum(), atol=1e-12)


def test_progress_starts_from_the_square_root_of_the_sizes_until_two_evaluations() -> None:
    start = Performance(SIZES, signal="progress", floor=0.0).probabilities
    told_twice = progress_of((0, results_of([0.1, 0.2, 0.3], [1, 2, 3])), (0, results_of([0.1, 0.2, 0.3], [1, 2, 3])))
    assert told_twice.probabilities == start
    np.testing.assert_allclose(start, [1 / 6, 2 / 6, 3 / 6], rtol=1e-14)


def test_progress_forgets_what_is_outside_the_window() -> None:
    rows = [(0, [0.9, 0.0, 0.0]), (1, [0.1, 0.1, 0.2]), (2, [0.1, 0.2, 0.4])]
    sampler = progress_of(*((step, results_of(scores, [1, 1, 1])) for step, scores in rows), window=2)
    np.testing.assert_allclose(sampler.probabilities, [0, 1 / 3, 2 / 3], atol=1e-12)


def test_progress_goes_by_relative_losses_unless_every_task_has_scores() -> None:
    without_scores = [(0, {0: 8.0, 1: 2.0, 2: 1.0}), (5, {0: 4.0, 1: 1.5, 2: 1.25})]
    sampler = progress_of(*((step, {t: {"loss": loss} for t, loss in row.items()}) for step, row in without_scores))
    np.testing.assert_allclose(sampler.signals["progress"], [0.1, 0.05, 0.05], rtol=1e-12)
    sampler = progress_of(
        (0, results_of([0, 0, 0], [8, 2, 1])), (5, {0: {"loss": 4.0}, 1: {"loss": 1.5, "score": 1.0}})
    )
    np.testing.assert_allclose(sampler.signals["progress"][:2], [0.1, 0.05], rtol=1e-12)
    assert sampler.signals["progress"][2] is None  # it counts with the mean of the others
    np.testing.assert_allclose(sampler.probabilities, np.array([0.1, 0.05, 0.075]) / 0.225, rtol=1e-12)


def test_no_progress_anywhere_is_uniform() -> None:
    sampler = progress_of(*((step, results_of([0.3, 0.5, 0.7], [1, 1, 1])) for step in (0, 1, 2)))
    assert sampler.probabilities == pytest.approx([1 / 3] * 3)


def test_what_the_signals_need() -> None:
    assert Performance(SIZES).needs == {"scores"}
    assert Performance(SIZES, signal="loss_ratio").needs == frozenset()
    assert Performance(SIZES, signal="progress").needs == {"validation"}


def test_signals_are_the_quantities_before_the_exponent() -> None:
    sampler = Performance(SIZES, exponent=2.0)
    sampler.update(trained({0: 1.0}))
    assert sampler.signals == {}
    sampler.update(evaluated({0: 0.75, 1: None, 2: 1.0}))
    assert sampler.signals == {"gap": [0.25, None, 0.0]}
    sampler = Performance(SIZES, signal="loss_ratio", smoothing=0.0)
    sampler.update(trained({0: 2.0, 1: 4.0}))
    sampler.update(trained({1: 1.0}))
    assert sampler.signals == {"loss_ratio": [1.0, 0.25, 1.0]}


@pytest.mark.parametrize("signal", ["gap", "loss_ratio", "progress"])
def test_absent_tasks_are_untouched(signal: Any) -> None:
    sampler = Performance(SIZES, signal=signal)
    sampler.update(trained({0: 1.0, 1: 2.0, 2: 3.0}))
    before = sampler.state_dict()
    sampler.update(trained({1: 0.5}, validation={1: {"loss": 1.0, "score": 0.3}}))
    after = sampler.state_dict()
    for key in ("scores", "base_losses", "mean_losses", "num_losses"):
        assert [before[key][task] for task in (0, 2)] == [after[key][task] for task in (0, 2)]
    assert after["mean_losses"][1] != before["mean_losses"][1]
    assert after["scores"][1] == 0.3


@pytest.mark.parametrize("signal", ["gap", "loss_ratio", "progress"])
def test_state_round_trips_bitwise(signal: Any) -> None:
    generator = np.random.default_rng(0)
    sampler, resumed = (Performance(SIZES, signal=signal, seed=seed) for seed in (0, 1))
    feedback = [
        trained(
            {task: float(generator.gamma(2.0)) for task in range(3) if generator.random() < 0.6},
            step,
            validation={0: {"loss": 1.0, "score": float(generator.random())}, 2: {"loss": 2.0}} if step % 3 else None,
        )
        for step in range(30)
    ]
    for each in feedback[:15]:
        sampler.counts(7)
        sampler.update(each)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict(), allow_nan=False)))
    assert resumed.probabilities == sampler.probabilities
    for each in feedback[15:]:
        assert sampler.counts(7) == resumed.counts(7)
        sampler.update(each)
        resumed.update(each)
        assert resumed.probabilities == sampler.probabilities
    assert sampler.state_dict() == resumed.state_dict()


def test_state_is_a_snapshot() -> None:
    sampler = Performance(SIZES)
    before = sampler.state_dict()
    sampler.update(trained({0: 1.0}, validation={0: {"loss": 1.0, "score": 0.5}}))
    assert before == Performance(SIZES).state_dict()


def test_counts_follow_the_moving_probabilities() -> None:
    sampler, expected, counts = Performance(SIZES), np.zeros(3), np.zeros(3)
    generator = np.random.default_rng(3)
    for _ in range(200):
        sampler.update(evaluated(dict(enumerate(generator.random(3).tolist()))))
        expected += 16 * np.array(sampler.probabilities)
        counts += sampler.counts(16)
        assert np.abs(counts - expected).max() < 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signal": "loss"}, r'^signal: must be "gap", "loss_ratio" or "progress", found \'loss\'; '),
        ({"exponent": -1.0}, r"^exponent: must be at least 0 and finite, found -1.0; "),
        ({"floor": 1.5}, r"^floor: must be a share in \[0, 1\], found 1.5; "),
        ({"floor": float("nan")}, r"^floor: must be a share in \[0, 1\], found nan; "),
        ({"smoothing": 1.0}, r"^smoothing: must be in \[0, 1\), found 1.0; "),
        ({"probability_smoothing": -0.1}, r"^probability_smoothing: must be in \[0, 1\), found -0.1; "),
        ({"window": 1}, r"^window: must be at least 2 evaluations, found 1; "),
        ({"targets": 85.0}, r"^targets: must be scores in \[0, 1\], found 85.0; divide percentages by 100"),
        ({"targets": {"d": 0.5}}, r"^targets: must name tasks of the run, found 'd'; the tasks are \['a', 'b', 'c'\]"),
        ({"targets": {"a": 0.5}, "names": None}, r"^names: must be given to read targets by task name, found None; "),
        ({"sizes": [1, 0, 1]}, r"^sizes: every task must have an example, found 0 at index 1; "),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Performance(**({"sizes": SIZES, "names": ["a", "b", "c"]} | arguments))
