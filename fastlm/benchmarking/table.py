"""Measures, for the table behind backend selection, whether the CPU kernels or PyTorch's operators are faster here."""

import functools
import statistics
from collections.abc import Iterator

import torch

from fastlm.backends.rule import DTYPES
from fastlm.benchmarking.compare import Row, baselines_of
from fastlm.benchmarking.measure import interleaved
from fastlm.benchmarking.operators import benchmarks, selection_inputs, timer
from fastlm.benchmarking.rules import CLEARLY
from fastlm.ops.benchmark import Case

# Beyond this ratio PyTorch is not measured further: it has no fast product of 16-bit numbers on some CPUs, and its
# larger calls would take minutes each.
TOO_SLOW = 20


def torch_is_faster(row: Row) -> bool:
    return row.backends["torch"].ratio.high < CLEARLY


def measure(budget: float = 2.0) -> Iterator[Row]:
    """Every operator's table_cases in every dtype, on PyTorch's number of threads; budget: seconds per case.

    Raises:
        Unsupported: no kernel is compiled.
    """
    for benchmark in benchmarks().values():
        too_slow = set()
        for case in benchmark.table_cases:
            for dtype in DTYPES:
                if (case.make, dtype) not in too_slow:
                    yield (row := measure_case(case, dtype, budget))
                    if row.backends["torch"].ratio.low > TOO_SLOW:  # also at larger sizes
                        too_slow.add((case.make, dtype))


def measure_case(case: Case, dtype: str, budget: float) -> Row:
    """The kernels, with PyTorch's operators among the other backends."""
    problem = case.problem(getattr(torch, dtype))
    operator, _, sizes = selection_inputs(problem)
    ours = {name: functools.partial(problem.ours, backend=name) for name in ("cpu", "torch")}
    timers = {name: timer(problem, function, "forward+backward") for name, function in ours.items()}
    seconds = {name: [timer(1)] for name, timer in timers.items()}
    if seconds["torch"][0] <= max(1.0, TOO_SLOW * seconds["cpu"][0]):
        seconds = interleaved(timers, rounds=30, budget=budget, least=2e-3)
    return Row(
        operator.name,
        problem.shape,
        dtype,
        torch.get_num_threads(),
        "forward+backward",
        "cpu",
        statistics.median(seconds["cpu"]),
        {},
        backends=baselines_of(seconds, {}, ours="cpu"),
        sizes=sizes._asdict(),
    )
