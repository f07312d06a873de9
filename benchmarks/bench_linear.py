"""GPT-2's projection before attention, 1024 × 768 → 2304, and the products of a few layers with few rows; FLOPs and bytes are counted in operators.py."""

import pytest

from benchmarks.support import every_way, other_sizes, run


@every_way("linear")
def test_linear(benchmark, dtype, number_of_threads, direction):
    run(benchmark, "linear", dtype, number_of_threads, direction)


@pytest.mark.parametrize("operator", other_sizes("linear"))
@every_way("linear")
def test_few_rows(benchmark, operator, dtype, number_of_threads, direction):
    run(benchmark, operator, dtype, number_of_threads, direction)
