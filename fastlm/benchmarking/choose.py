"""Which of fastlm's kernels and PyTorch's own operators is the faster one on this machine, for the table that backends choose by."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping

import torch

import fastlm
from fastlm.backends import choice, table
from fastlm.benchmarking.compare import DTYPES
from fastlm.benchmarking.measure import Ratio, in_turn
from fastlm.benchmarking.operators import CASES, ROWS, Case, Function

SIZES = {"small": 32, "large": ROWS}  # rows: a few sequences that generate, a batch that trains
BETWEEN = 181  # their geometric mean: on either side of it the nearer measurement holds
ROWS_OF = {"attention": "query_len", "attention_varlen": "query_tokens"}  # what the table calls the rows, where not "rows"
HOPELESS = 20  # times as slow: PyTorch has no fast product of 16-bit numbers for some CPUs. Its larger calls would take minutes each
CLEARLY = 0.97  # slower than that counts; within it the kernels serve, whose promises are the wider ones


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


def measure(cases: Mapping[str, Callable[..., Case]] | None = None, sizes: Mapping[str, int] | None = None, budget: float = 2.0) -> Iterator[Verdict]:
    """One after the other, fewer rows first, on PyTorch's number of threads. fastlm.Unsupported where no kernel is compiled."""
    for make in (cases or CASES).values():
        for dtype in (*DTYPES, "float16"):
            for rows in (sizes or SIZES).values():
                seen = verdict(make(getattr(torch, dtype), rows=rows), dtype, rows, budget)
                yield seen
                if seen.hopeless:
                    break


def rules(verdicts: list[Verdict]) -> list[table.Rule]:
    """PyTorch serves where it was clearly faster: everywhere, or on one side of BETWEEN."""
    found = []
    for operator, dtype in dict.fromkeys((v.operator, v.dtype) for v in verdicts):
        won = {v.rows > BETWEEN for v in verdicts if (v.operator, v.dtype) == (operator, dtype) and v.torch_wins}
        if won:
            ends = (BETWEEN + 1 if False not in won else None, BETWEEN if True not in won else None)
            found.append(table.Rule(operator, dtype, {} if len(won) == 2 else {ROWS_OF.get(operator, "rows"): ends}))
    return found


def remember(found: list[table.Rule]) -> None:
    """Into the user's cache, beside what it holds for other machines; from now on, in this process too."""
    path = table.user_table()
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    kept = kept if isinstance(kept, dict) else {}
    kept[table.cpu()] = [dataclasses.asdict(rule) for rule in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(kept, indent=1) + "\n")
    beside.replace(path)
    table.forget()
    choice.CHOICES.clear()
