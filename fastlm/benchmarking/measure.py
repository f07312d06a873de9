"""How everything here is timed: in turn, so that a machine that slows down slows all; compared round by round, so that it cancels out."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Timer = Callable[[], float]  # does the work once and returns the seconds of the part that counts

LEAST_ROUNDS = 5  # below that, quartiles say nothing


def timed(call: Callable[[], object]) -> Timer:
    def timer() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timer


def in_turn(
    timers: Mapping[str, Timer], rounds: int, *, budget: float = float("inf"), least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per call of each, once per round.

    Args:
        rounds: at most; every other round runs backwards, so that none always comes after the same other.
        budget: seconds after which no round begins, once there were LEAST_ROUNDS.
        least: seconds that one timing should take; a shorter call is repeated within it, and the mean counts.
    """
    times = {}
    for name, timer in timers.items():
        timer()  # allocates, packs, compiles
        times[name] = max(1, round(least / max(timer(), 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in timers}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        for name in list(timers)[:: 1 if i % 2 == 0 else -1]:
            taken[name].append(statistics.fmean(timers[name]() for _ in range(times[name])))
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
        return f"{self.median:.2f} [{self.low:.2f}–{self.high:.2f}]"
