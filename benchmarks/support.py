"""How every benchmark here reports: pytest-benchmark times ours, and beside it stand the ratios to PyTorch's, round by round in the same run.

The measuring itself is fastlm/benchmarking/, which `fastlm bench` uses too.
"""

import os

import pytest

from fastlm.benchmarking.compare import DTYPES, Row, compare
from fastlm.benchmarking.machine import threads
from fastlm.benchmarking.operators import CASES, OTHERS, directions

# torch.compile takes half a minute per row; BENCH_COMPILE=0 leaves it out.
COMPILED = os.environ.get("BENCH_COMPILE", "1") != "0"

on_one_thread_and_two = pytest.mark.parametrize("number_of_threads", [1, 2], ids=lambda n: f"{n}-thread")
in_both_dtypes = pytest.mark.parametrize("dtype", list(DTYPES))


def every_way(operator: str):
    """One benchmark per dtype, number of threads and direction."""

    def mark(test):
        return in_both_dtypes(on_one_thread_and_two(pytest.mark.parametrize("direction", directions(operator))(test)))

    return mark


def other_sizes(operator: str) -> list[str]:
    return [name for name in OTHERS if name.startswith(operator)]


def run(benchmark, operator: str, dtype: str, number_of_threads: int, direction: str) -> None:
    """Ours under pytest-benchmark; then ours and PyTorch's in turn for extra_info."""
    case = (CASES | OTHERS)[operator](DTYPES[dtype])
    prepare, work = case.parts(case.ours, direction)
    with threads(number_of_threads):
        benchmark.pedantic(work, setup=lambda: ((prepare(),), {}), rounds=10, warmup_rounds=1)
    describe(benchmark, compare(case, number_of_threads, direction, compiled=COMPILED))


def describe(benchmark, row: Row) -> None:
    for name, rival in row.rivals.items():
        benchmark.extra_info[f"times as fast as PyTorch {name}"] = str(rival.ratio)
    benchmark.extra_info |= {
        "best rival": row.best_rival,
        "served by": row.backend,
        "threads": row.threads,
        "shape": row.shape,
        "seconds": row.seconds,
    }
    if row.share is not None:
        benchmark.extra_info["share of peak"] = f"{row.share:.0%} of what {row.bound} allows"
    if row.bytes_held is not None:
        benchmark.extra_info["bytes held"] = {
            "fastlm": row.bytes_held,
            **{name: rival.bytes for name, rival in row.rivals.items() if rival.bytes},
        }
