"""attention: the cases of fastlm/ops/attention/bench.py."""

from benchmarks.support import every_case, run


@every_case("attention")
def test_attention(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
