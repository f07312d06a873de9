"""GPT-2's projection before attention, 1024 × 768 → 2304; FLOPs and bytes are counted in operators.py."""

from benchmarks.support import every_way, run


@every_way("linear")
def test_linear(benchmark, dtype, number_of_threads, direction):
    run(benchmark, "linear", dtype, number_of_threads, direction)
