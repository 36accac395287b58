"""Which tasks count as weak: golden values of every rule."""

import pytest

from mtl.weak import WEAKNESSES, Standing, weakest, weaknesses

STANDINGS = [
    Standing(loss=1.0, base_loss=2.0, score=0.4, best_score=0.6, reference=0.5, target=0.3),
    Standing(loss=3.0, base_loss=4.0, score=0.01, best_score=0.01, reference=0.03, target=0.9),
    Standing(loss=0.9, base_loss=1.0),  # only a loss
    Standing(loss=0.1, base_loss=1.0, score=0.9, best_score=0.9, reference=0.6),
]
EXPECTED = {
    "loss_ratio": [0.5, 0.75, 0.9, 0.1],
    "score": [0.6, 0.99, None, 0.1],
    "reference": [0.2, 0.4, None, -0.5],  # (.5 - .4) / .5; (.03 - .01) / .05, the floor
    "target": [-0.1, 0.89, None, None],
    "best": [0.2, 0.0, None, 0.0],
}


@pytest.mark.parametrize("rule", WEAKNESSES)
def test_golden_values(rule):
    assert weaknesses(rule, STANDINGS) == [value if value is None else pytest.approx(value) for value in EXPECTED[rule]]


@pytest.mark.parametrize(
    ("rule", "number", "minimum", "chosen"),
    [
        ("loss_ratio", 2, None, [1, 2]),
        ("loss_ratio", None, None, [0, 1, 2, 3]),
        ("loss_ratio", None, 0.75, [2]),
        ("score", 1, None, [1]),
        ("reference", None, None, [0, 1]),  # a task above its reference is not weak
        ("reference", None, 0.3, [1]),
        ("reference", 1, None, [1]),
        ("target", None, None, [1]),
        ("best", 2, None, [0]),  # one that is at its best is not weak
        ("best", 2, 0.5, []),
    ],
)
def test_the_weakest_above_the_minimum(rule, number, minimum, chosen):
    values = weaknesses(rule, STANDINGS)
    assert weakest(rule, values, num_weakest=number, min_weakness=minimum) == chosen


def test_of_equals_the_first_ones_are_chosen():
    assert weakest("score", [0.5, 0.5, 0.5], num_weakest=2, min_weakness=None) == [0, 1]
