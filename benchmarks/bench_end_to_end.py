"""A training step of GPT-2 small, forward to AdamW, 1 × 1024 tokens: fastlm as it comes against the plain PyTorch model (fastlm/training/baseline.py) as it
comes, and against the same with glibc's allocator keeping its memory. Each in a process of its own: an allocator reads its settings once.
"""

from benchmarks.support import COMPILED, describe, in_both_dtypes, on_one_thread_and_two
from fastlm.benchmarking.actor import Actor
from fastlm.benchmarking.whole import BATCH, CONTEXT, SMALL, compare_steps


@in_both_dtypes
@on_one_thread_and_two
def test_training_step(benchmark, dtype, number_of_threads):
    work = {"library": "fastlm", "dtype": dtype, "number_of_threads": number_of_threads, "sizes": SMALL, "batch": BATCH, "context": CONTEXT}
    with Actor("step_timer", work) as step:
        step()
        benchmark.pedantic(step, rounds=3)
    describe(benchmark, compare_steps(dtype, number_of_threads, compiled=COMPILED))
