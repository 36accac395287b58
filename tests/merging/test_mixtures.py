"""The search on losses that are known functions of the weights."""

import math
from fractions import Fraction
from itertools import product

import pytest

from mtl.evaluation.results import TaskEvaluation
from mtl.merging.mixtures import Mixture, Search, Spent, corner, mean_of, towards


def evaluation(loss):
    return TaskEvaluation(loss, 1, 1, None, {}, [])


def objective(items):
    total = sum(item.loss for item in items)
    return -total if math.isfinite(total) else -math.inf


def distance(weights, target):
    return sum((float(weight) - goal) ** 2 for weight, goal in zip(weights, target, strict=True))


def searched(shared_target, private_targets=(), *, num_points=None, num_branches=None, limit=1000, losses=None):
    """Searches where each task's loss is 1 + the squared distances of its weights to what is best for it."""
    num_points = num_points or len(shared_target or private_targets[0])
    tried = []

    def evaluate(mixture):
        if mixture in tried:
            return found(mixture)
        if len(tried) == limit:
            raise Spent
        tried.append(mixture)
        return found(mixture)

    def found(mixture):
        if losses is not None:
            return [evaluation(losses(mixture))]
        shared = distance(mixture.shared, shared_target) if shared_target else 0.0
        own = [distance(own, goal) for own, goal in zip(mixture.private_T, private_targets, strict=True)]
        return [evaluation(1 + shared + item) for item in own or [0.0]]

    search = Search(
        num_points=num_points,
        num_branches=num_branches or num_points,
        num_tasks=max(1, len(private_targets)),
        has_shared=bool(shared_target),
        has_private=bool(private_targets),
        evaluate=evaluate,
        objective=lambda items: (
            -sum(item.loss for item in items) if all(math.isfinite(i.loss) for i in items) else -math.inf
        ),
        task_value=lambda task, item: -item.loss,
    )
    search.run()
    return search, tried


def test_weights_stay_on_the_simplex_and_moves_are_exact():
    weights = towards(towards(corner(0, 3), 1, Fraction(1, 6)), 2, Fraction(2, 5))
    assert weights == (Fraction(1, 2), Fraction(1, 10), Fraction(2, 5))
    assert mean_of([0, 1], 3) == (Fraction(1, 2), Fraction(1, 2), 0)
    _, tried = searched((0.2, 0.3, 0.5))
    assert all(sum(mixture.shared) == 1 and min(mixture.shared) >= 0 for mixture in tried)


def test_the_points_and_their_mean_come_first_and_the_start_is_no_part_of_the_mean():
    _, tried = searched((0.5, 0.3, 0.2), num_branches=2)
    assert [mixture.shared for mixture in tried[:4]] == [*(corner(i, 3) for i in range(3)), mean_of([0, 1], 3)]


def test_the_greedy_grid_is_that_of_the_paper():
    """The second point gets alpha times the weight of the first, renormalised; the third alpha times the mean."""
    _, tried = searched((0.9, 0.1, 0.0), limit=13)
    alphas = [0.2, 0.4, 0.6, 0.8, 1.0]
    second = [mixture.shared for mixture in tried[4:9]]
    assert [tuple(map(float, w)) for w in second] == [pytest.approx((1 / (1 + a), a / (1 + a), 0)) for a in alphas]
    a, b = 1 / 1.2, 0.2 / 1.2  # the nearest of these
    third = [tuple(map(float, mixture.shared)) for mixture in tried[9:13]]
    totals = [1.2 + alpha * 0.6 for alpha in alphas]
    assert third == [pytest.approx((a * 1.2 / t, b * 1.2 / t, 1 - 1.2 / t)) for t in totals[:4]]


def test_an_interior_optimum_on_the_grid_is_found():
    search, _ = searched((5 / 8, 3 / 8))
    assert search.best == Mixture((Fraction(5, 8), Fraction(3, 8)), ())
    assert search.value == -1


def test_the_result_is_near_the_best_of_a_fine_grid():
    goal = (0.45, 0.35, 0.2)
    search, tried = searched(goal)
    assert distance(search.best.shared, goal) < 0.01
    assert len(tried) < 60


@pytest.mark.parametrize("goal", [(1.0, 0.0), (0.0, 1.0)])
def test_one_branch_alone_can_be_best(goal):
    assert searched(goal)[0].best.shared == goal


def test_it_is_never_worse_than_any_point_however_rough_the_losses_are():
    for seed in range(30):
        search, tried = searched((1, 0, 0), losses=lambda mixture, seed=seed: hash((seed, mixture)) % 997 / 100)
        assert search.value == max(-(hash((seed, mixture)) % 997 / 100) for mixture in tried)
        assert search.value >= max(search.values_P)


def test_each_task_has_its_own_weights_for_its_own_parameters():
    goals = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    search, tried = searched((), goals)
    assert search.best == Mixture((), tuple(tuple(map(Fraction, goal)) for goal in goals))
    assert search.value == -3
    # At worst as many as a single task takes: one trial tells of all.
    assert len(tried) <= 40


def test_shared_and_own_weights_are_found_together():
    search, _ = searched((5 / 8, 3 / 8), [(1.0, 0.0), (0.0, 1.0)])
    assert search.best.private_T == (corner(0, 2), corner(1, 2))
    assert search.value == pytest.approx(-2, abs=0.02)


def test_the_limit_holds_and_keeps_the_best_so_far():
    for limit in range(2, 20):
        search, tried = searched((0.45, 0.35, 0.2), limit=limit)
        assert len(tried) <= limit
        assert search.value == max(-1 - distance(mixture.shared, (0.45, 0.35, 0.2)) for mixture in tried)


def test_the_same_again_takes_the_same_way():
    assert searched((0.3, 0.7), [(0.1, 0.9)])[1] == searched((0.3, 0.7), [(0.1, 0.9)])[1]


def test_a_branch_that_diverged_is_never_taken():
    def losses(mixture):
        return math.nan if mixture.shared[0] else 1.0 + float(mixture.shared[2])

    search, _ = searched((1, 0, 0), losses=losses)
    assert search.best.shared == corner(1, 3)
    nothing, tried = searched((1, 0, 0), losses=lambda mixture: math.nan)
    assert nothing.best is None
    assert len(tried) == 4


def test_of_equals_the_first_stays():
    search, _ = searched((1, 0), losses=lambda mixture: 1.0)
    assert search.best.shared == corner(0, 2)


def test_all_pairs_of_two_goals():
    for first, second in product((0.0, 0.25, 0.5, 0.75, 1.0), repeat=2):
        search, _ = searched((), [(first, 1 - first), (second, 1 - second)])
        assert search.value > -2 - 2 * 0.005
