"""Training steps, forward to AdamW: fastlm, its allocator tuned, against the plain PyTorch models (fastlm/training/baseline*.py) as they come, and with the
same allocator settings. Each in a process of its own: the settings cannot be undone.
"""

import dataclasses

import pytest

from benchmarks.support import COMPILED, describe, in_both_dtypes, on_one_thread_and_two
from fastlm.benchmarking.actor import Actor
from fastlm.benchmarking.whole import MODELS, compare_steps


@in_both_dtypes
@on_one_thread_and_two
@pytest.mark.parametrize("model", MODELS)
def test_training_step(benchmark, model, dtype, number_of_threads):
    work = {
        "library": "fastlm",
        "dtype": dtype,
        "number_of_threads": number_of_threads,
        "subject": dataclasses.asdict(MODELS[model]),
        "tuned": True,
    }
    with Actor("whole.step_timer", work) as step:
        step()
        benchmark.pedantic(step, rounds=3)
    describe(benchmark, compare_steps(dtype, number_of_threads, subject=MODELS[model], compiled=COMPILED))
