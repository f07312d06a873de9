"""The values that the options of the commands accept, for their checks and their help."""

from collections.abc import Iterable

from fastlm.benchmarking import accelerated, operators, whole

OPERATORS = tuple(operators.CASES)
VARIANTS = tuple(operators.OTHERS)  # operators at other sizes or with other options
# Measured in worker processes of their own, with PyTorch's default allocator and with the tuned one.
WHOLE_RUNS = ("training_step", "growth", "accelerated")
BENCHMARKS = (*OPERATORS, *VARIANTS, "adamw", "generation", *WHOLE_RUNS)
DIRECTIONS = tuple(operators.DIRECTIONS)
MODELS = tuple(whole.MODELS)
ACCELERATED = tuple(accelerated.CASES)


def listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))
