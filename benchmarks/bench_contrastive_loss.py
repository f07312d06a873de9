"""contrastive_loss: the cases of fastlm/ops/contrastive_loss/bench.py."""

from benchmarks.support import every_case, run


@every_case("contrastive_loss")
def test_contrastive_loss(benchmark, case, dtype, number_of_threads, direction):
    run(benchmark, case, dtype, number_of_threads, direction)
