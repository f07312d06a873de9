"""What this machine can do at most, measured in the same run as what is compared with it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from fastlm.backends import isa
from fastlm.benchmarking.measure import Ratio, timed


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
    if timer() > 1:
        return timer()  # nothing of the kind is a peak
    return min(timer() for _ in range(times))


@dataclasses.dataclass(frozen=True)
class Probe:
    """A call that keeps one part of the machine busy and nothing else. Timed in turn with what is measured, it says what the machine can do at that moment: a
    virtual one may have half the speed a minute later.
    """

    call: Callable[[], object]
    amount: float  # of bytes read or floating-point operations done

    def share(self, amount: float, seconds: Sequence[float], own_seconds: Sequence[float]) -> float:
        """Of the machine's rate, round by round, that work of this amount reached; the median."""
        return amount / self.amount * Ratio.of(seconds, own_seconds).median


@functools.cache
def reading() -> Probe:
    """A sum over 256 MB, far more than any cache holds: one addition per four bytes, so nothing but the memory is busy."""
    numbers = torch.ones(64 << 20)
    return Probe(numbers.sum, numbers.nbytes)


@functools.cache
def read_bandwidth(number_of_threads: int) -> float:
    """Bytes/s of reading()."""
    with threads(number_of_threads):
        return reading().amount / best(reading().call)


@functools.cache
def product(number_of_threads: int, dtype: torch.dtype) -> tuple[Probe, float]:
    """The fastest of PyTorch's own matrix products at 1024³, and its FLOP/s."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    with threads(number_of_threads), torch.no_grad():
        seconds = {call: best(call) for call in (lambda: a @ b, lambda: a @ b.T)}
    call = min(seconds, key=lambda each: seconds[each])
    return Probe(call, 2 * 1024**3), 2 * 1024**3 / seconds[call]


@functools.cache
def arithmetic(number_of_threads: int, dtype: torch.dtype) -> Probe:
    """Multiply-adds of the kind that fastlm's products in this dtype are made of, in registers; without kernels PyTorch's product, a tenth or so slower."""
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
    """What a call must do at least: floating-point operations (a multiply-add is two), and bytes read from and written to memory."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def bound(self, number_of_threads: int, dtype: torch.dtype) -> tuple[str, Probe, float]:
        """memory or arithmetic, whichever takes the longer here; what probes it; how much of it there is to do."""
        if self.bytes / read_bandwidth(number_of_threads) > self.flops / peak(number_of_threads, dtype):
            return "memory", reading(), self.bytes
        return "arithmetic", arithmetic(number_of_threads, dtype), self.flops
