"""Causal attention of 12 heads of 64 over 1024 tokens and other lengths, on views of a packed projection; FLOPs and bytes are counted in operators.py."""

import pytest

from benchmarks.support import every_way, other_sizes, run


@every_way("attention")
def test_attention(benchmark, dtype, number_of_threads, direction):
    run(benchmark, "attention", dtype, number_of_threads, direction)


@pytest.mark.parametrize("operator", other_sizes("attention"))
@every_way("attention")
def test_other_sizes(benchmark, operator, dtype, number_of_threads, direction):
    run(benchmark, operator, dtype, number_of_threads, direction)
