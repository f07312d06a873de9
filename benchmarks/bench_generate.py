"""Greedy generation with GPT-2 small, 64 tokens after a prompt of 64, against plain PyTorch with a KV cache.

Every new token reads all weights once (0.5 GB in float32): the least time is that many bytes over the read bandwidth.
"""

import torch

from benchmarks.support import describe, in_both_dtypes, on_one_thread_and_two
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.whole import NEW_TOKENS, PROMPT, SMALL, compare_generation, model_of


@in_both_dtypes
@on_one_thread_and_two
def test_generate(benchmark, dtype, number_of_threads):
    model = model_of(SMALL).to(DTYPES[dtype]).eval()
    tokens = torch.randint(SMALL["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": ()}
    with threads(number_of_threads):
        benchmark.pedantic(model.generate, (tokens,), options, rounds=3, warmup_rounds=1)
    describe(benchmark, compare_generation(dtype, number_of_threads))
