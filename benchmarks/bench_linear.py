"""linear: the cases of fastlm/ops/linear/bench.py."""

from benchmarks.support import every_case, run


@every_case("linear")
def test_linear(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
