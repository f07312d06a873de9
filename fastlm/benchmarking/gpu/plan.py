"""What is measured on a GPU, the most important first, as the time may run out."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from fastlm.benchmarking.compare import Row
from fastlm.benchmarking.gpu.timing import compare
from fastlm.benchmarking.operators import benchmarks
from fastlm.ops.benchmark import Case

DTYPES = (torch.bfloat16, torch.float32, torch.float16)  # whose peaks are measured

Planned = tuple[Case, str]  # a case and its dtype


def planned() -> tuple[list[Planned], list[Planned]]:
    """(before the training step and generation, after them): the operators' cases by priority."""
    cases = [case for benchmark in benchmarks().values() for case in benchmark.gpu_cases]
    pairs = [(case, dtype) for case in sorted(cases, key=lambda case: case.priority) for dtype in case.dtypes]
    first = [pair for pair in pairs if pair[0].priority == 0]
    return first, pairs[len(first) :]


@dataclasses.dataclass
class Run:
    """Measurements within a time limit: which failed, and which were not started."""

    limit: float = float("inf")  # seconds
    stopped: bool = False  # by a signal
    failed: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return self.stopped or time.monotonic() - self.began > self.limit

    def attempt(self, what: str, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """The rows as they are measured. A failure is recorded, and the rest goes on."""
        if self.over:
            self.left_out.append(what)
            return
        try:
            yield from rows()
        except Exception as error:  # of a kernel or a compiler, or out of memory
            self.failed.append(f"{what}: {' '.join(str(error).split())[:1000] or type(error).__name__}")

    def measure(
        self, device: str, pairs: Sequence[Planned], compiled: bool = False, **options: float | bool
    ) -> Iterator[Row]:
        """options: as for timing.compare(). compiled: the cases with such baselines, and no others."""
        for case, dtype in pairs:
            if compiled and not case.compiled:
                continue

            def rows(case: Case = case, dtype: str = dtype) -> Iterator[Row]:
                kind = getattr(torch, dtype)
                return compare(case, kind, device, compiled=compiled, **options)  # type: ignore[arg-type]

            yield from self.attempt(f"{case}, {dtype}{', compiled' * compiled}", rows)
            if device == "cuda":
                torch.cuda.empty_cache()
