"""Causal attention of 12 heads of 64 over 1024 tokens, on views of a packed projection; FLOPs and bytes are counted in operators.py."""

from benchmarks.support import every_way, run


@every_way("attention")
def test_attention(benchmark, dtype, number_of_threads, direction):
    run(benchmark, "attention", dtype, number_of_threads, direction)
