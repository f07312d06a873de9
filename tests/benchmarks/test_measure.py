import pytest

from fastlm.benchmarking.machine import Probe
from fastlm.benchmarking.measure import MIN_ROUNDS, Ratio, interleaved


def timer(name, seconds, calls):
    def run(n=1):
        calls.extend([name] * n)
        return seconds

    return run


def test_every_second_round_is_reversed():
    calls = []
    taken = interleaved({"a": timer("a", 1.0, calls), "b": timer("b", 2.0, calls)}, rounds=4)
    assert "".join(calls[4:]) == "abbaabba"  # after a warm-up and a timing of one call
    assert taken == {"a": [1.0] * 4, "b": [2.0] * 4}


def test_a_short_call_is_repeated_within_its_round():
    calls = []
    interleaved({"a": timer("a", 0.001, calls), "b": timer("b", 1.0, calls)}, rounds=1, least=0.01)
    assert calls[4:] == ["a"] * 10 + ["b"]


def test_a_spent_budget_still_leaves_enough_rounds():
    taken = interleaved({"a": timer("a", 1.0, [])}, rounds=100, budget=0.0)
    assert len(taken["a"]) == MIN_ROUNDS


def test_ratios_are_of_rounds_not_of_means():
    # The machine is half as fast in the last two rounds; the speedup is 2 in every round.
    ratio = Ratio.of([1.0, 1.0, 2.0, 2.0], [2.0, 2.0, 4.0, 4.0])
    assert ratio == Ratio(2.0, 2.0, 2.0)
    spread = Ratio.of([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0])
    assert spread.median == 2.5 and spread.low < 2 < 3 < spread.high
    assert str(Ratio(1.234, 1.2, 1.3)) == "1.23 [1.20–1.30]"
    assert Ratio.of([2.0], [3.0]) == Ratio(1.5, 1.5, 1.5)


def test_rounds_must_pair_up():
    with pytest.raises(ValueError):
        Ratio.of([1.0], [1.0, 2.0])


def test_a_share_refers_to_the_peak_of_the_same_round():
    probe = Probe(lambda: None, amount=1e9)
    assert probe.share(2e9, [4.0, 8.0, 2.0], [1.0, 2.0, 0.5]) == 0.5  # in each round, though the rate changed
    assert probe.share(0.5e9, [1.0, 1.0, 1.0], [1.0, 1.2, 0.8]) == 0.5
