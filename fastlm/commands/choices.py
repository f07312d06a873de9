"""The values that the options of the commands accept, for their checks and their help."""

from collections.abc import Iterable

from fastlm.benchmarking import operators
from fastlm.integrations.bench import CASES as ACCELERATED_CASES
from fastlm.ops import benchmark
from fastlm.training import bench

CASES = operators.cases()
DEFAULT_CASES = tuple(name for name, case in CASES.items() if case.default)
# Measured in worker processes of their own, with PyTorch's default allocator and with the tuned one.
WHOLE_RUNS = ("training_step", "growth", "accelerated")
BENCHMARKS = (*CASES, "generation", *WHOLE_RUNS)
DIRECTIONS = benchmark.DIRECTIONS
MODELS = tuple(bench.MODELS)
ACCELERATED = tuple(ACCELERATED_CASES)


def listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))
