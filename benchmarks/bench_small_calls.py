"""Operators on operands of 2 × 16, where host time is all there is, against PyTorch's own operators."""

import pytest

from benchmarks.support import run
from fastlm.benchmarking.operators import cases


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", [name for name in cases() if name.endswith("_small")])
def test_small_call(benchmark, name, direction):
    run(benchmark, cases()[name], "float32", 1, direction)
