"""layernorm_residual: the cases of fastlm/ops/layernorm_residual/bench.py."""

from benchmarks.support import every_case, run


@every_case("layernorm_residual")
def test_layernorm_residual(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
