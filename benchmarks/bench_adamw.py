"""adamw: the cases of fastlm/ops/adamw/bench.py."""

from benchmarks.support import every_case, run


@every_case("adamw")
def test_adamw(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
