import pytest

from fastlm.benchmarking.machine import Probe
from fastlm.benchmarking.measure import LEAST_ROUNDS, Ratio, in_turn


def timer(name, seconds, calls):
    def run():
        calls.append(name)
        return seconds

    return run


def test_the_order_turns_round_every_round():
    calls = []
    taken = in_turn({"a": timer("a", 1.0, calls), "b": timer("b", 2.0, calls)}, rounds=4)
    assert "".join(calls[4:]) == "abbaabba"  # after one to warm up and one to see how long it takes
    assert taken == {"a": [1.0] * 4, "b": [2.0] * 4}


def test_a_short_call_is_repeated_within_its_round():
    calls = []
    in_turn({"a": timer("a", 0.001, calls), "b": timer("b", 1.0, calls)}, rounds=1, least=0.01)
    assert calls[4:] == ["a"] * 10 + ["b"]


def test_a_spent_budget_still_leaves_enough_rounds():
    taken = in_turn({"a": timer("a", 1.0, [])}, rounds=100, budget=0.0)
    assert len(taken["a"]) == LEAST_ROUNDS


def test_ratios_are_of_rounds_not_of_means():
    # the machine halves its speed for both in the last two rounds: round by round we are twice as fast throughout
    ratio = Ratio.of([1.0, 1.0, 2.0, 2.0], [2.0, 2.0, 4.0, 4.0])
    assert ratio == Ratio(2.0, 2.0, 2.0)
    spread = Ratio.of([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0])
    assert spread.median == 2.5 and spread.low < 2 < 3 < spread.high
    assert str(Ratio(1.234, 1.2, 1.3)) == "1.23 [1.20–1.30]"
    assert Ratio.of([2.0], [3.0]) == Ratio(1.5, 1.5, 1.5)


def test_rounds_must_pair_up():
    with pytest.raises(ValueError):
        Ratio.of([1.0], [1.0, 2.0])


def test_a_share_is_of_what_the_machine_could_do_at_that_moment():
    probe = Probe(lambda: None, amount=1e9)
    assert (
        probe.share(2e9, [4.0, 8.0, 2.0], [1.0, 2.0, 0.5]) == 0.5
    )  # half of the rate in each round, though the rate changed
    assert probe.share(0.5e9, [1.0, 1.0, 1.0], [1.0, 1.2, 0.8]) == 0.5
