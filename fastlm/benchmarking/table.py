"""Measures, for the table behind backend selection, whether the CPU kernels or PyTorch's operators are faster here."""

import dataclasses
import functools
from collections.abc import Iterator

import torch

from fastlm.backends.rule import DTYPES, Rule
from fastlm.benchmarking import rules
from fastlm.benchmarking.measure import Ratio, interleaved
from fastlm.benchmarking.operators import benchmarks, selection_inputs, timer
from fastlm.benchmarking.rules import CLEARLY, Point
from fastlm.ops.benchmark import Case, Problem

# Beyond this ratio PyTorch is not measured further: it has no fast product of 16-bit numbers on some CPUs, and its
# larger calls would take minutes each.
TOO_SLOW = 20


@dataclasses.dataclass(frozen=True)
class Verdict:
    operator: str
    dtype: str
    shape: str
    sizes: dict[str, int]  # as backend selection sees them
    ratio: Ratio  # speedup of the kernel over PyTorch, forward and backward

    @property
    def torch_is_faster(self) -> bool:
        return self.ratio.high < CLEARLY

    @property
    def torch_is_too_slow(self) -> bool:
        """Also at larger sizes."""
        return self.ratio.low > TOO_SLOW


def compare_backends(problem: Problem, budget: float) -> Ratio:
    ours = {name: functools.partial(problem.ours, backend=name) for name in ("cpu", "torch")}
    timers = {name: timer(problem, function, "forward+backward") for name, function in ours.items()}
    seconds = {name: [timer(1)] for name, timer in timers.items()}
    if seconds["torch"][0] <= max(1.0, TOO_SLOW * seconds["cpu"][0]):
        seconds = interleaved(timers, rounds=30, budget=budget, least=2e-3)
    return Ratio.of(seconds["cpu"], seconds["torch"])


def measure(budget: float = 2.0) -> Iterator[Verdict]:
    """Every operator's table_cases in every dtype, on PyTorch's number of threads; budget: seconds per case.

    Raises:
        Unsupported: no kernel is compiled.
    """
    for benchmark in benchmarks().values():
        too_slow = set()
        for case in benchmark.table_cases:
            for dtype in DTYPES:
                if (case.make, dtype) not in too_slow:
                    yield (verdict := measure_case(case, dtype, budget))
                    if verdict.torch_is_too_slow:
                        too_slow.add((case.make, dtype))


def measure_case(case: Case, dtype: str, budget: float) -> Verdict:
    problem = case.problem(getattr(torch, dtype))
    operator, _, seen = selection_inputs(problem)
    return Verdict(operator.name, dtype, problem.shape, seen._asdict(), compare_backends(problem, budget))


def rules_of(verdicts: list[Verdict]) -> list[Rule]:
    """PyTorch is selected where it was clearly faster: everywhere, or on one side of the sizes' geometric mean."""
    points = [Point(v.operator, v.dtype, v.sizes, "torch" if v.torch_is_faster else None) for v in verdicts]
    return rules.derive(points, {name: benchmark.axes for name, benchmark in benchmarks().items()})
