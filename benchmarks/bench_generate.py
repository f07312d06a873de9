"""Greedy generation, 64 tokens after a prompt of 64, with a KV cache: GPT-2 against plain PyTorch, SmolLM 2 against
transformers.

Every new token reads all weights once (0.5 GB in float32): the least time is that many bytes over the read bandwidth.
"""

import pytest
import torch

from benchmarks.support import describe, in_both_dtypes, on_one_thread_and_two
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.whole import NEW_TOKENS, PROMPT, compare_generation
from fastlm.models.bench import GENERATORS, generator


@in_both_dtypes
@on_one_thread_and_two
@pytest.mark.parametrize("name", GENERATORS)
def test_generate(benchmark, name, dtype, number_of_threads):
    model = generator(name, DTYPES[dtype])
    tokens = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": ()}
    with threads(number_of_threads):
        benchmark.pedantic(model.generate, (tokens,), options, rounds=3, warmup_rounds=1)
    describe(benchmark, compare_generation(name, dtype, number_of_threads))
