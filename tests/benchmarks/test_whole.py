import pytest

from fastlm.benchmarking import whole
from fastlm.benchmarking.actor import TUNED, Actor

SIZES = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 50, "n_positions": 32}
WORK = {"dtype": "float32", "number_of_threads": 1, "sizes": SIZES, "batch": 2, "context": 16}


def test_steps_are_compared_between_processes():
    row = whole.compare_steps("float32", 1, sizes=SIZES, batch=2, context=16, rounds=5)
    assert list(row.rivals) == ["eager", "eager tuned"]
    assert row.tokens == 32 and row.seconds > 0 and "cpu" in row.backend
    assert row.bytes_held > 50 << 20  # of a process that has PyTorch in it


def test_an_actor_has_the_environment_it_was_given(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")  # the user's own settings must not tune the one that is to be as it comes
    for environment in ({}, TUNED):
        with Actor("step_timer", WORK | {"library": "torch"}, environment) as actor:
            assert actor() > 0
            seen = dict(pair.split("=", 1) for pair in open(f"/proc/{actor.process.pid}/environ").read().split("\0") if "=" in pair)
        assert {name: seen.get(name) for name in TUNED} == {name: environment.get(name) for name in TUNED}
        assert actor.process.returncode == 0


def test_an_actor_that_fails_says_so():
    with Actor("step_timer", WORK | {"library": "torch", "batch": 0}) as actor, pytest.raises(RuntimeError, match=r"step_timer .* ended with exit code 1"):
        actor()


def test_generations_are_compared():
    row = whole.compare_generation("bfloat16", 1, sizes=SIZES, prompt=4, new_tokens=6, rounds=5)
    assert row.operator == "generation" and row.tokens == 6 and list(row.rivals) == ["eager"]
