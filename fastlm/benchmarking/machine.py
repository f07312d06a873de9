"""The machine's peaks, measured in the same run as what is compared with them."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from fastlm.backends import isa
from fastlm.benchmarking.measure import Ratio, timed
from fastlm.core.huge_pages import on_huge_pages


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best(call: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several calls. A peak is what an undisturbed machine reaches."""
    timer = timed(call)
    if timer() > 1:
        return timer()  # no peak is that slow
    return min(timer() for _ in range(times))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A call that uses one part of the machine only.

    Interleaved with a measurement it tells the peak at that moment: a virtual machine may be half as fast a minute
    later.
    """

    call: Callable[[], object]
    amount: float  # bytes read or floating-point operations

    def share(self, amount: float, seconds: Sequence[float], own_seconds: Sequence[float]) -> float:
        """The share of the peak that work of this amount reached: the median over the rounds."""
        return amount / self.amount * Ratio.of(seconds, own_seconds).median


@functools.cache
def reading() -> Probe:
    """A sum over 256 MB, more than any cache holds, with one addition per four bytes: bound by memory bandwidth.

    On huge pages where the system grants them: on a virtual machine, reading small ones is bound by finding them.
    """
    numbers = on_huge_pages(torch.empty(64 << 20)).fill_(1)
    return Probe(numbers.sum, numbers.nbytes)


@functools.cache
def read_bandwidth(number_of_threads: int) -> float:
    """Bytes/s of reading()."""
    with threads(number_of_threads):
        return reading().amount / best(reading().call)


@functools.cache
def product(number_of_threads: int, dtype: torch.dtype) -> tuple[Probe, float]:
    """The fastest of PyTorch's matrix products of 1024³ multiply-adds, and its FLOP/s."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    with threads(number_of_threads), torch.no_grad():
        seconds = {call: best(call) for call in (lambda: a @ b, lambda: a @ b.T)}
    call = min(seconds, key=lambda each: seconds[each])
    return Probe(call, 2 * 1024**3), 2 * 1024**3 / seconds[call]


@functools.cache
def arithmetic(number_of_threads: int, dtype: torch.dtype) -> Probe:
    """The multiply-adds that fastlm's matrix products in this dtype use, on registers.

    Without compiled kernels, PyTorch's matrix product, which is about a tenth slower.
    """
    kernels = isa.kernels
    if not kernels:
        return product(number_of_threads, dtype)[0]
    rounds = 1 << 20  # milliseconds

    def call() -> float:
        return kernels.multiply_adds(dtype=dtype, rounds=rounds, threads=number_of_threads)

    return Probe(call, call())


@functools.cache
def peak(number_of_threads: int, dtype: torch.dtype) -> float:
    """FLOP/s of arithmetic()."""
    probe = arithmetic(number_of_threads, dtype)
    with threads(number_of_threads), torch.no_grad():
        return probe.amount / best(probe.call)


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that a call must do: floating-point operations (two per multiply-add), and bytes of memory traffic."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def bound(self, number_of_threads: int, dtype: torch.dtype) -> tuple[str, Probe, float]:
        """("memory" or "arithmetic", whichever takes longer here; its probe; the amount of it)."""
        if self.bytes / read_bandwidth(number_of_threads) > self.flops / peak(number_of_threads, dtype):
            return "memory", reading(), self.bytes
        return "arithmetic", arithmetic(number_of_threads, dtype), self.flops
