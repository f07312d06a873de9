import pytest

from fastlm.benchmarking.machine import threads


@pytest.fixture(autouse=True)
def one_thread():
    """At sizes this small, threads mostly wait for each other."""
    with threads(1):
        yield
