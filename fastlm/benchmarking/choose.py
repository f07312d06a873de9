"""Which of fastlm's kernels and PyTorch's own operators is the faster one on this machine, for the table that backends choose by."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch

import fastlm
from fastlm.backends import table
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.measure import Ratio, in_turn
from fastlm.benchmarking.operators import CASES, ROWS, Case, Function
from fastlm.benchmarking.rules import CLEARLY, Point
from fastlm.benchmarking.rules import rules as from_points

SIZES = {"small": 32, "large": ROWS}  # rows: a few sequences that generate, a batch that trains
ROWS_OF = {
    "attention": "query_len",
    "attention_varlen": "query_tokens",
}  # what the table calls the rows, where not "rows"
HOPELESS = 20  # times as slow: PyTorch has no fast product of 16-bit numbers for some CPUs. Its larger calls would take minutes each


@dataclasses.dataclass(frozen=True)
class Verdict:
    operator: str
    dtype: str
    rows: int
    ratio: Ratio  # how many times as fast as PyTorch's the kernel is, forward and backward

    @property
    def torch_wins(self) -> bool:
        return self.ratio.high < CLEARLY

    @property
    def hopeless(self) -> bool:
        """Whether PyTorch will not win with more rows either."""
        return self.ratio.low > HOPELESS


def forced(function: Function, backend: str) -> Function:
    def call(*inputs):
        with fastlm.use_backend(backend):
            return function(*inputs)

    return call


def verdict(case: Case, dtype: str, rows: int, budget: float) -> Verdict:
    timers = {name: case.timer(forced(case.ours, name), "forward+backward") for name in ("cpu", "torch")}
    once = {name: [timer()] for name, timer in timers.items()}
    hopeless = once["torch"][0] > max(1.0, HOPELESS * once["cpu"][0])
    taken = once if hopeless else in_turn(timers, rounds=30, budget=budget, least=2e-3)
    return Verdict(case.operator, dtype, rows, Ratio.of(taken["cpu"], taken["torch"]))


def measure(
    cases: Mapping[str, Callable[..., Case]] | None = None, sizes: Mapping[str, int] | None = None, budget: float = 2.0
) -> Iterator[Verdict]:
    """One after the other, fewer rows first, on PyTorch's number of threads. fastlm.Unsupported where no kernel is compiled."""
    for make in (cases or CASES).values():
        for dtype in (*DTYPES, "float16"):
            for rows in (sizes or SIZES).values():
                seen = verdict(make(getattr(torch, dtype), rows=rows), dtype, rows, budget)
                yield seen
                if seen.hopeless:
                    break


def rules(verdicts: list[Verdict]) -> list[table.Rule]:
    """PyTorch serves where it was clearly faster: everywhere, or on one side of the sizes' geometric mean."""
    rows_of = {operator: ROWS_OF.get(operator, "rows") for operator in CASES}
    found = [
        Point(v.operator, v.dtype, {rows_of[v.operator]: v.rows}, "torch" if v.torch_wins else None) for v in verdicts
    ]
    return from_points(found, {operator: (({}, (rows,)),) for operator, rows in rows_of.items()})
