"""The loss of GPT-2's output projection, 1024 × 768 → 50257; its gradients are computed in the forward pass, so there is no backward alone to time."""

from benchmarks.support import every_way, run


@every_way("linear_cross_entropy")
def test_linear_cross_entropy(benchmark, dtype, number_of_threads, direction):
    run(benchmark, "linear_cross_entropy", dtype, number_of_threads, direction)
