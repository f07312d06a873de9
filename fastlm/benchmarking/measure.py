"""How everything here is timed: in turn, so that a machine that slows down slows all; compared round by round, so that it cancels out."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Per call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int, *, budget: float = float("inf"), least: float = 0.0) -> dict[str, list[float]]:
    """Seconds per call of each, once per round.

    Args:
        rounds: at most; every other round runs backwards, so that none always comes after the same other.
        budget: seconds after which no round begins, once there were five.
        least: seconds that one timing should take; a shorter call is repeated within it.
    """
    times = {}
    for name, call in calls.items():
        call()  # allocates, packs, compiles
        times[name] = max(1, round(least / max(min(seconds(call) for _ in range(2)), 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 5 and time.perf_counter() - start > budget:
            break
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            taken[name].append(seconds(calls[name], times[name]))
    return taken


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast as the rival: the median of the rounds, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], rival: Sequence[float]) -> "Ratio":
        ratios = [b / a for a, b in zip(ours, rival, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}–{self.high:.2f})"
