"""linear_cross_entropy: the cases of fastlm/ops/linear_cross_entropy/bench.py."""

from benchmarks.support import every_case, run


@every_case("linear_cross_entropy")
def test_linear_cross_entropy(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
