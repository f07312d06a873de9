"""rms_norm_residual: the cases of fastlm/ops/rms_norm_residual/bench.py."""

from benchmarks.support import every_case, run


@every_case("rms_norm_residual")
def test_rms_norm_residual(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
