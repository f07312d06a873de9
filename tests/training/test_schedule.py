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
