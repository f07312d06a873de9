"""One row of the table: an operator, a dtype, a number of threads, a direction; ours and PyTorch's in turn."""

import dataclasses
import os
import statistics
from typing import Any

import torch

from fastlm.backends import choice
from fastlm.benchmarking import accuracy
from fastlm.benchmarking.machine import Work, threads
from fastlm.benchmarking.measure import Ratio, in_turn, timed
from fastlm.benchmarking.operators import Case, Function

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Rival:
    seconds: float  # median
    ratio: Ratio  # how many times as fast we are
    bytes: int | None = None  # at most at once


@dataclasses.dataclass(frozen=True)
class Row:
    operator: str
    shape: str
    dtype: str
    threads: int
    direction: str  # forward, backward, forward+backward; or what a whole step or generation is of
    backend: str  # who served our call
    seconds: float  # ours, median
    rivals: dict[str, Rival]
    share: float | None = None  # of what the machine can do, probed in turn
    bound: str | None = None  # by what: memory or arithmetic
    work: Work | None = None
    bytes_held: int | None = None  # at most at once
    tokens: int | None = None  # per call, of a whole step or generation
    recompute: int | None = None  # the level, of a training step
    error: float | None = None  # against float64, over that of eager

    @property
    def best_rival(self) -> str:
        return min(self.rivals, key=lambda name: self.rivals[name].seconds)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "best_rival": self.best_rival}


def served_by(call) -> str:
    """Whose kernels ran: what the choice remembered of this call."""
    choice.CHOICES.clear()
    call()
    return ", ".join(backends_seen())


def backends_seen() -> list[str]:
    return sorted({str(choice.name_of(module)) for module, _ in choice.CHOICES.values()})


def contestants(case: Case, *, compiled: bool) -> dict[str, Function]:
    rivals = {"fastlm": case.ours, "eager": case.eager}
    return rivals | {"compiled": torch.compile(case.eager)} if compiled else rivals


def compare(
    case: Case, number_of_threads: int, direction: str, *, compiled: bool = False, rounds: int = 30, budget: float = 3.0
) -> Row:
    """compiled: also against torch.compile, which needs a C++ compiler and half a minute per operator."""
    dtype, work = case.inputs[0].dtype, case.least(direction)
    bound, probe, amount = work.bound(number_of_threads, dtype)
    with threads(number_of_threads):
        timers = {
            name: case.timer(function, direction) for name, function in contestants(case, compiled=compiled).items()
        }
        backend = served_by(timers["fastlm"])
        taken = in_turn({**timers, "machine": timed(probe.call)}, rounds, budget=budget, least=2e-3)
        both = direction == "forward+backward"
        held = {name: bytes_held(timers[name]) for name in ("fastlm", "eager") if both}
        error = error_of(case) if both and not case.random else None
    ours, own = taken.pop("fastlm"), taken.pop("machine")
    return Row(
        case.operator,
        case.shape,
        str(dtype).removeprefix("torch."),
        number_of_threads,
        direction,
        backend,
        statistics.median(ours),
        {
            name: Rival(statistics.median(theirs), Ratio.of(ours, theirs), held.get(name))
            for name, theirs in taken.items()
        },
        share=probe.share(amount, ours, own),
        bound=bound,
        work=work,
        bytes_held=held.get("fastlm"),
        error=error,
    )


def error_of(case: Case) -> float:
    """Of the results and all gradients, at the very sizes that are timed."""
    true = case.results(case.eager, torch.float64)
    error = accuracy.error_over_theirs(true, case.results(case.eager), case.results(case.ours))
    return accuracy.checked(
        error, f"{case.operator} of {case.shape} in {str(case.inputs[0].dtype).removeprefix('torch.')}"
    )


def bytes_held(call) -> int:
    """What PyTorch's allocator gave out at most at once during a call, beyond what was there before.

    The kernels' own packing buffers, some hundred kilobytes per thread, are not in it.
    """
    call()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler announces itself on stderr every time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    held = most = 0
    for event in sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        most = max(most, held)
    return most
