"""glu_mlp: the cases of fastlm/ops/glu_mlp/bench.py."""

from benchmarks.support import every_case, run


@every_case("glu_mlp")
def test_glu_mlp(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
