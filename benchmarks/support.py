"""What every benchmark here shares: pytest-benchmark times fastlm, and extra_info has the speedups over PyTorch.

The measurements are those of `fastlm bench`; the cases of an operator are in fastlm/ops/<operator>/bench.py.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest

from fastlm.benchmarking.compare import DTYPES, Row, compare
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.operators import benchmarks, parts
from fastlm.ops.benchmark import Case

# torch.compile takes half a minute per row; BENCH_COMPILE=0 leaves it out.
COMPILED = os.environ.get("BENCH_COMPILE", "1") != "0"

on_one_thread_and_two = pytest.mark.parametrize("number_of_threads", [1, 2], ids=lambda n: f"{n}-thread")
in_both_dtypes = pytest.mark.parametrize("dtype", list(DTYPES))


def every_case(operator: str) -> Callable[[Any], Any]:
    """A benchmark per case of the operator, direction, dtype and number of threads."""
    pairs = [
        pytest.param(case, direction, id=f"{case.name}-{direction}")
        for case in benchmarks()[operator].cases
        for direction in case.directions
    ]

    def mark(test: Any) -> Any:
        return in_both_dtypes(on_one_thread_and_two(pytest.mark.parametrize("case, direction", pairs)(test)))

    return mark


def run(benchmark: Any, case: Case, dtype: str, number_of_threads: int, direction: str) -> None:
    problem = case.problem(DTYPES[dtype])
    prepare, work = parts(problem, problem.ours, direction)
    with threads(number_of_threads):
        benchmark.pedantic(work, setup=lambda: ((prepare(),), {}), rounds=10, warmup_rounds=1)
    row = compare(case, dtype, number_of_threads, direction, compiled=COMPILED, problem=problem)
    describe(benchmark, row)


def describe(benchmark: Any, row: Row) -> None:
    for name, baseline in row.baselines.items():
        benchmark.extra_info[f"speedup over PyTorch {name}"] = str(baseline.ratio)
    benchmark.extra_info |= {
        "best baseline": row.best_baseline,
        "backend": row.backend,
        "threads": row.threads,
        "shape": row.shape,
        "seconds": row.seconds,
    }
    if row.share is not None:
        benchmark.extra_info["share of peak"] = f"{row.share:.0%} of what {row.bound} allows"
    if row.bytes_held is not None:
        peaks = {name: baseline.bytes for name, baseline in row.baselines.items() if baseline.bytes}
        benchmark.extra_info["peak memory"] = {"fastlm": row.bytes_held, **peaks}
