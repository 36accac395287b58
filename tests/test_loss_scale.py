import math

from mtl.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE, LossScale


def test_halves_at_an_overflow_down_to_one_and_then_has_no_excuse():
    scale = LossScale(enabled=True)
    seen = []
    while scale.overflowed():
        seen.append(scale.scale)
    assert seen == [INITIAL_SCALE / 2**k for k in range(1, 17)]
    assert scale.scale == 1.0
    assert all(math.frexp(value)[0] == 0.5 for value in seen)


def test_doubles_after_enough_good_steps_in_a_row():
    scale = LossScale(enabled=True)
    for _ in range(GROWTH_INTERVAL - 1):
        scale.succeeded()
    assert scale.overflowed()  # the count starts again
    for _ in range(GROWTH_INTERVAL - 1):
        scale.succeeded()
    assert scale.scale == INITIAL_SCALE / 2
    scale.succeeded()
    assert scale.scale == INITIAL_SCALE


def test_state_goes_on_where_it_was():
    scale = LossScale(enabled=True)
    scale.overflowed()
    for _ in range(GROWTH_INTERVAL - 1):
        scale.succeeded()
    other = LossScale(enabled=True)
    other.load_state_dict(scale.state_dict())
    other.succeeded()
    assert other.scale == INITIAL_SCALE


def test_without_float16_it_is_one_for_ever():
    scale = LossScale(enabled=False)
    assert not scale.overflowed()
    for _ in range(2 * GROWTH_INTERVAL):
        scale.succeeded()
    scale.load_state_dict({"scale": 4.0, "num_good_steps": 3})  # of a checkpoint that was made with float16
    assert scale.scale == 1.0
