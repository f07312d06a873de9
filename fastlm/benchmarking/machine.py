"""What this machine can do at most, measured in the same run as what is compared with it."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch

import fastlm
from fastlm.benchmarking.measure import timed


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best(call, times: int = 5) -> float:
    """Seconds of the fastest: a peak is what the machine can do when nothing else disturbs it."""
    timer = timed(call)
    timer()
    return min(timer() for _ in range(times))


@functools.cache
def read_bandwidth(number_of_threads: int) -> float:
    """Bytes/s of a sum over 256 MB, far more than any cache holds: one addition per four bytes, so nothing but the memory is busy."""
    numbers = torch.ones(64 << 20)
    with threads(number_of_threads):
        return numbers.nbytes / best(numbers.sum)


@functools.cache
def product_peak(number_of_threads: int, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest matrix product that PyTorch or fastlm computes here, at 1024³: a stand-in for the rate of the multiply-add units.

    Products of that size come within a tenth of it, so a share of this peak is at most so much too high.
    """
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    with threads(number_of_threads), torch.no_grad():
        return 2 * 1024**3 / min(best(call) for call in (lambda: a @ b, lambda: a @ b.T, lambda: fastlm.linear(a, b)))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call must do at least: floating-point operations (a multiply-add is two), and bytes read from and written to memory."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def least_seconds(self, number_of_threads: int, dtype: torch.dtype) -> float:
        return max(self.flops / product_peak(number_of_threads, dtype), self.bytes / read_bandwidth(number_of_threads))

    def bound(self, number_of_threads: int, dtype: torch.dtype) -> str:
        by_memory = self.bytes / read_bandwidth(number_of_threads) > self.flops / product_peak(number_of_threads, dtype)
        return "memory" if by_memory else "arithmetic"
