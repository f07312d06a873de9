"""LayerNorm of a residual sum, 1024 × 768 and 16384 × 768; FLOPs and bytes are counted in operators.py."""

import pytest

from benchmarks.support import every_way, other_sizes, run


@pytest.mark.parametrize("operator", ["layernorm_residual", *other_sizes("layernorm_residual")])
@every_way("layernorm_residual")
def test_layernorm_residual(benchmark, operator, dtype, number_of_threads, direction):
    run(benchmark, operator, dtype, number_of_threads, direction)
