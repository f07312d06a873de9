"""GPT-2's feed-forward part, 1024 × 768 → 3072 → 768, tanh GELU; FLOPs and bytes are counted in operators.py."""

from benchmarks.support import every_way, run


@every_way("gelu_mlp")
def test_gelu_mlp(benchmark, dtype, number_of_threads, direction):
    run(benchmark, "gelu_mlp", dtype, number_of_threads, direction)
