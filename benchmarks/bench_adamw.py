"""AdamW over the 124 million parameters of GPT-2 small, with clipping; bytes are counted in fastlm/benchmarking/optimizer.py."""

import torch

from benchmarks.support import describe, in_both_dtypes, on_one_thread_and_two
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.optimizer import adamw, compare_adamw, gpt2_shapes


@in_both_dtypes
@on_one_thread_and_two
def test_adamw(benchmark, dtype, number_of_threads):
    parameters = [torch.randn(shape).to(DTYPES[dtype]).requires_grad_() for shape in gpt2_shapes()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    with threads(number_of_threads):
        benchmark.pedantic(adamw(parameters), rounds=10, warmup_rounds=2)
    del parameters
    describe(benchmark, compare_adamw(dtype, number_of_threads))
