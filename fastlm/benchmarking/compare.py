"""One row of the results, and the rows of a CPU: a case in one dtype, number of threads and direction."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastlm.benchmarking import accuracy
from fastlm.benchmarking.machine import Work, threads
from fastlm.benchmarking.measure import Ratio, interleaved, timed
from fastlm.benchmarking.memory import peak_of_call
from fastlm.benchmarking.operators import backends_of, results, timer, work_of
from fastlm.ops.benchmark import Case, Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Baseline:
    seconds: float  # median
    ratio: Ratio  # our speedup over it
    bytes: int | None = None  # peak memory


@dataclasses.dataclass(frozen=True)
class Row:
    operator: str  # the case's name; or training_step, generation, …
    shape: str
    dtype: str
    threads: int | None  # None for a GPU
    direction: str  # forward, backward, forward+backward, step; or the variant of a whole step
    backend: str  # that our call ran on; "auto" for a model on a GPU, of which each call selects its own
    seconds: float  # ours, median
    baselines: dict[str, Baseline]
    share: float | None = None  # of the machine's peak, measured in the same rounds
    bound: str | None = None  # the peak that limits it: memory or arithmetic
    work: Work | None = None
    bytes_held: int | None = None  # peak memory
    tokens: int | None = None  # per call, of a whole step or generation
    recompute: int | None = None  # the level, of a training step
    error: float | None = None  # against float64, relative to eager's
    # Where backends are compared with each other: the others, whether automatic selection takes this one, and the sizes
    # that it sees.
    backends: dict[str, Baseline] = dataclasses.field(default_factory=dict)
    auto: bool = False
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def best_baseline(self) -> str | None:
        return min(self.baselines, key=lambda name: self.baselines[name].seconds, default=None)

    @property
    def speedup(self) -> Ratio:
        """Over the fastest baseline; there must be one."""
        return min(self.baselines.values(), key=lambda baseline: baseline.seconds).ratio

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "best_baseline": self.best_baseline}


def baselines_of(
    seconds: Mapping[str, Sequence[float]],
    peaks: Mapping[str, int | None],
    but: Sequence[str] = (),
    ours: str = "fastlm",
) -> dict[str, Baseline]:
    """Of interleaved timings: everything except ours and `but`."""
    return {
        name: Baseline(statistics.median(taken), Ratio.of(seconds[ours], taken), peaks.get(name))
        for name, taken in seconds.items()
        if name != ours and name not in but
    }


def compare(
    case: Case,
    dtype: str,
    number_of_threads: int,
    direction: str,
    *,
    compiled: bool = False,
    rounds: int = 30,
    budget: float = 3.0,
    problem: Problem | None = None,
) -> Row:
    """compiled: also against torch.compile, which takes half a minute per case and needs a C++ compiler."""
    problem = problem or case.problem(DTYPES[dtype])
    functions = {"fastlm": problem.ours, **problem.baselines, **(problem.compiled_baselines() if compiled else {})}
    both = direction == "forward+backward"
    with threads(number_of_threads):
        work = work_of(problem, direction)
        bound, probe, amount = work.bound(number_of_threads, DTYPES[dtype])
        timers = {name: timer(problem, function, direction) for name, function in functions.items()}
        backend = backends_of(timers["fastlm"])
        seconds = interleaved({**timers, "machine": timed(probe.call)}, rounds, budget=budget, least=2e-3)
        peaks = {name: peak_of_call(timers[name]) for name in ("fastlm", "eager") if both}
        what = f"{case.name} of {problem.shape} in {dtype}"
        error = accuracy.checked(error_of(problem), what) if both and not problem.random else None
    return Row(
        case.name,
        problem.shape,
        dtype,
        number_of_threads,
        direction,
        backend,
        statistics.median(seconds["fastlm"]),
        baselines_of(seconds, peaks, but=["machine"]),
        share=probe.share(amount, seconds["fastlm"], seconds["machine"]),
        bound=bound,
        work=work,
        bytes_held=peaks.get("fastlm"),
        error=error,
    )


def error_of(problem: Problem) -> float:
    """Of the results and all gradients, at the sizes that are timed, relative to eager's."""
    eager = problem.baselines["eager"]
    true = results(problem, eager, torch.float64)
    return accuracy.relative_to_baseline(true, results(problem, eager), results(problem, problem.ours))
