"""The values that the options of the commands accept, for their checks and their help."""

from collections.abc import Iterable

from fastlm.benchmarking import accelerated, operators, whole
from fastlm.ops import benchmark

CASES = operators.cases()
DEFAULT_CASES = tuple(name for name, case in CASES.items() if case.default)
# Measured in worker processes of their own, with PyTorch's default allocator and with the tuned one.
WHOLE_RUNS = ("training_step", "growth", "accelerated")
BENCHMARKS = (*CASES, "generation", *WHOLE_RUNS)
DIRECTIONS = benchmark.DIRECTIONS
MODELS = tuple(whole.MODELS)
ACCELERATED = tuple(accelerated.CASES)


def listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))
