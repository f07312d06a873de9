"""LayerNorm of a residual sum, 1024 × 768; FLOPs and bytes are counted in operators.py."""

from benchmarks.support import every_way, run


@every_way("layernorm_residual")
def test_layernorm_residual(benchmark, dtype, number_of_threads, direction):
    run(benchmark, "layernorm_residual", dtype, number_of_threads, direction)
