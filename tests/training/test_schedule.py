import math

import pytest

from fastlm.training.schedule import learning_rate

RATES = {"lr": 1.0, "min_lr": 0.1, "warmup": 4, "decay_steps": 14}


@pytest.mark.parametrize(
    "step, expected",
    # Step 9 is in the middle of the decay, so its rate is the mean of lr and min_lr.
    [(0, 0.2), (3, 0.8), (4, 1.0), (9, 0.55), (14, 0.1), (1000, 0.1)],
)
def test_values(step, expected):
    assert learning_rate(step, **RATES) == pytest.approx(expected)


def test_rate_rises_then_decays():
    rates = [learning_rate(i, **RATES) for i in range(20)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_without_warmup():
    assert learning_rate(0, **RATES | {"warmup": 0}) == 1.0


def test_warmup_longer_than_decay_steps():
    assert learning_rate(20, **RATES | {"warmup": 30}) == pytest.approx(21 / 31)
    assert learning_rate(30, **RATES | {"warmup": 30}) == 0.1


@pytest.mark.parametrize(
    "schedule, expected",
    [
        # At steps 4 (the end of the warm-up), 9 (the middle), 10 (where wsd begins to decay), 11, and 14.
        ("cosine", [1.0, 0.55, 0.1 + 0.9 * (1 + math.cos(0.6 * math.pi)) / 2, None, 0.1]),
        ("linear", [1.0, 0.55, 0.46, 0.37, 0.1]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("wsd", [1.0, 1.0, 1.0, 0.1 + 0.9 * (1 - 0.5), 0.1]),
    ],
)
def test_schedules(schedule, expected):
    options = RATES | {"schedule": schedule, "decay_fraction": 4 / 14}
    assert [learning_rate(i, **options) for i in range(4)] == [0.2, 0.4, 0.6, 0.8]
    for step, value in zip((4, 9, 10, 11, 14), expected, strict=True):
        assert value is None or learning_rate(step, **options) == pytest.approx(value)


def test_wsd_that_decays_from_the_warmup_on():
    options = RATES | {"schedule": "wsd", "decay_fraction": 1.0}
    assert learning_rate(4, **options) == 1.0 and learning_rate(5, **options) < 0.75
