"""rotary: the cases of fastlm/ops/rotary/bench.py."""

from benchmarks.support import every_case, run


@every_case("rotary")
def test_rotary(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
