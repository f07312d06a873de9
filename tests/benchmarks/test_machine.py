"""The microbenchmarks of the machine's peaks.

Seconds are of the processor. A busy machine disturbs them all the same, so that what they show may take several tries.
"""

import time

import pytest
import torch

import fastlm
from fastlm.backends import isa
from fastlm.benchmarking import machine

pytestmark = pytest.mark.skipif(not isa.kernels, reason=f"not compiled: {isa.missing}")
TRIES = 5


def best_of(call, times=10):
    def seconds():
        start = time.process_time()
        call()
        return time.process_time() - start

    return min(seconds() for _ in range(times))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_multiply_adds_are_those_counted(dtype):
    """Twice the rounds are twice the FLOPs and take twice as long: the compiler removes none."""

    def multiply_adds(rounds, threads=1):
        return isa.kernels.multiply_adds(dtype=getattr(torch, dtype), rounds=rounds, threads=threads)

    flops = [multiply_adds(rounds) for rounds in (1 << 18, 1 << 19)]
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01) and multiply_adds(1 << 18, 3) == 3 * flops[0]

    def ratio():
        short, long = (best_of(lambda n=n: multiply_adds(n)) for n in (1 << 18, 1 << 20))
        return long / short

    assert any(2 < ratio() < 8 for _ in range(TRIES))


def test_no_product_is_faster_than_its_multiply_adds():
    """Of fastlm's kernels: PyTorch's products may use another instruction set."""
    a, b, arithmetic = torch.randn(1024, 1024), torch.randn(1024, 1024), machine.arithmetic(1, torch.float32)

    def ratio():
        product = best_of(lambda: fastlm.linear(a, b, backend="cpu")) / (2 * 1024**3)
        return best_of(arithmetic.call) / arithmetic.amount / product

    with machine.threads(1):
        assert any(ratio() < 1.2 for _ in range(TRIES))  # the clock frequency may change in between
    assert machine.product(1, torch.float32)[1] > 0
