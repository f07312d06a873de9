"""linear_log_prob: the cases of fastlm/ops/linear_log_prob/bench.py."""

from benchmarks.support import every_case, run


@every_case("linear_log_prob")
def test_linear_log_prob(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
