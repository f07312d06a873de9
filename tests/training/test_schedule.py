import pytest

from fastlm.training.schedule import learning_rate

RATES = {"lr": 1.0, "min_lr": 0.1, "warmup": 4, "decay_steps": 14}


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.2),
        (3, 0.8),
        (4, 1.0),
        (9, 0.55),
        (14, 0.1),
        (1000, 0.1),
    ],  # 9 is half way through the cosine: half way between the two
)
def test_values(step, expected):
    assert learning_rate(step, **RATES) == pytest.approx(expected)


def test_rises_then_falls():
    rates = [learning_rate(i, **RATES) for i in range(20)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_no_warmup_begins_at_the_top():
    assert learning_rate(0, **RATES | {"warmup": 0}) == 1.0


def test_warmup_may_reach_beyond_the_decay():
    assert learning_rate(20, **RATES | {"warmup": 30}) == pytest.approx(21 / 31)
    assert learning_rate(30, **RATES | {"warmup": 30}) == 0.1
