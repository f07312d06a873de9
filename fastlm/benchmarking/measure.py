"""How everything is timed: interleaved, so that a slow machine slows all alike, and compared round by round."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

MIN_ROUNDS = 5  # with fewer, quartiles mean nothing


class Timer(Protocol):
    def __call__(self, n: int = 1) -> float:
        """The mean seconds of n calls."""


def timed(call: Callable[[], object]) -> Timer:
    def timer(n: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - start) / n

    return timer


def interleaved(
    timers: Mapping[str, Timer], rounds: int, *, budget: float = float("inf"), least: float = 0.0, warmup: int = 1
) -> dict[str, list[float]]:
    """Mean seconds per call of each timer, one value per round.

    Args:
        rounds: at most. Every second round runs in reverse order.
        budget: seconds after which no round starts, once MIN_ROUNDS are complete.
        least: seconds that one timing should take; shorter calls are repeated.
        warmup: calls before anything is timed: they allocate, pack and compile.
    """
    repeats = {}
    for name, timer in timers.items():
        for _ in range(warmup):
            timer(1)
        repeats[name] = max(1, round(least / max(timer(1), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= MIN_ROUNDS and time.perf_counter() - start > budget:
            break
        for name in list(timers)[:: 1 if i % 2 == 0 else -1]:
            seconds[name].append(timers[name](repeats[name]))
    return seconds


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A speedup over a baseline: the median of the rounds' ratios and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], baseline: Sequence[float]) -> "Ratio":
        ratios = [b / a for a, b in zip(ours, baseline, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}–{self.high:.2f}]"
