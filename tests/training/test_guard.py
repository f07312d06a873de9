import math

import pytest
import torch

from fastlm.training.guard import FEWEST, WINDOW, Guard
from fastlm.training.settings import Settings
from fastlm.training.trainer import Outcome

GOOD, BAD = Outcome(2.0, 1.0), Outcome(math.nan, math.nan, "its loss is nan")
OVERFLOW = Outcome(2.0, math.inf, "its gradient norm is inf", overflow=True)


def recorded(outcomes, **settings):
    guard = Guard(Settings(**settings))
    for step, outcome in enumerate(outcomes, 1):
        guard.record(step, outcome)
    return guard


def test_account():
    guard = recorded([GOOD, BAD, OVERFLOW, BAD, GOOD, BAD, OVERFLOW], max_skipped=3)
    assert (guard.skipped, guard.overflows, guard.in_a_row) == ([2, 4, 6], [3, 7], 1)


@pytest.mark.parametrize("dtype, advice", [("fp32", "with --init"), ("fp16", "with --init, or --dtype bf16")])
def test_too_many_in_a_row(dtype, advice):
    guard = recorded([BAD, GOOD, BAD, OVERFLOW], max_skipped=2, dtype=dtype)
    with pytest.raises(ValueError) as error:
        guard.record(5, BAD)
    assert str(error.value) == (
        "lr: expected a learning rate with finite losses and gradients (2 steps in a row were skipped; of step 5, "
        f"its loss is nan; use a smaller one, from the last checkpoint {advice}), got 0.001"
    )


def test_no_step_is_a_spike_by_default():
    assert recorded([GOOD] * 200).max_loss == math.inf


def test_the_largest_loss_that_is_no_spike():
    """Against NumPy-free arithmetic: of 1, 2, …, 128 the median is 64.5 and the MAD 32."""
    losses = [Outcome(float(i), 1.0) for i in range(-50, WINDOW + 1)]
    assert recorded(losses[: FEWEST - 1], skip_spikes=3.0).max_loss == math.inf
    guard = recorded([*losses, BAD, OVERFLOW], skip_spikes=3.0)  # of which the last 128 count, without skipped ones
    assert guard.max_loss == pytest.approx(64.5 + 3 * 1.4826 * 32, rel=1e-6)
    assert guard.max_loss == torch.tensor(guard.max_loss).item()  # a float32
    constant = recorded([GOOD] * 50, skip_spikes=8.0)
    assert constant.max_loss == pytest.approx(2.0 * 1.08)


def test_state():
    outcomes = [GOOD, BAD, OVERFLOW, *[Outcome(3.0 + i / 100, 1.0) for i in range(40)], BAD, OVERFLOW, BAD]
    guard = recorded(outcomes, skip_spikes=5.0)
    again = Guard(guard.settings)
    again.load_state(guard.state(), [outcome.loss for outcome in outcomes])
    assert vars(again) == vars(guard) and again.in_a_row == 2 and again.max_loss == guard.max_loss
