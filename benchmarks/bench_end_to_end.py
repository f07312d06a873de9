"""Training steps, forward to AdamW, against the plain PyTorch models (fastlm/training/baseline*.py).

fastlm tunes its allocator; PyTorch is measured with the default settings and with the same ones, each in a worker
process.
"""

import dataclasses

import pytest

from benchmarks.support import COMPILED, describe, in_both_dtypes, on_one_thread_and_two
from fastlm.benchmarking.whole import compare_steps
from fastlm.benchmarking.worker import Worker
from fastlm.training.bench import MODELS


@in_both_dtypes
@on_one_thread_and_two
@pytest.mark.parametrize("model", MODELS)
def test_training_step(benchmark, model, dtype, number_of_threads):
    arguments = {
        "library": "fastlm",
        "dtype": dtype,
        "number_of_threads": number_of_threads,
        "subject": dataclasses.asdict(MODELS[model]),
        "tuned": True,
    }
    with Worker("whole.step_timer", arguments) as step:
        step()
        benchmark.pedantic(step, rounds=3)
    describe(benchmark, compare_steps(dtype, number_of_threads, subject=MODELS[model], compiled=COMPILED))
