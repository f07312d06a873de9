"""gelu_mlp: the cases of fastlm/ops/gelu_mlp/bench.py."""

from benchmarks.support import every_case, run


@every_case("gelu_mlp")
def test_gelu_mlp(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
