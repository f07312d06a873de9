"""The time per token as the context or the width of a model grows: training steps of small GPT-2s.

A size from which on every token costs much more than its arithmetic would show as a step in the curve.
"""

import dataclasses
from typing import Any

from fastlm.benchmarking.compare import Row
from fastlm.benchmarking.whole import Subject, compare_steps

# By series and size. Along a series the number of tokens per step and the size of a head are constant.
SERIES: dict[str, dict[int, Subject]] = {
    "context": {
        size: Subject("GPT-2", 2, 256, 4, 256, 4096 // size, size) for size in (128, 256, 512, 1024, 2048, 4096)
    },
    "width": {
        size: Subject("GPT-2", 2, size, size // 64, 4096, 2, 128) for size in (256, 384, 512, 768, 1024, 1536, 2048)
    },
}
POINTS = {f"{series} {size}": subject for series, sizes in SERIES.items() for size, subject in sizes.items()}
SHAPES = {
    "context": "GPT-2, 2 layers of 256, 4096 tokens per step",
    "width": "GPT-2, 2 layers, heads of 64, vocabulary 4096, 2 × 128 tokens",
}


def compare_growth(point: str, dtype: str, number_of_threads: int, **options: Any) -> Row:
    """A training step at one of the POINTS, with the options of compare_steps."""
    row = compare_steps(dtype, number_of_threads, subject=POINTS[point], **options)
    return dataclasses.replace(row, operator="growth", shape=SHAPES[series_of(point)], direction=point)


def series_of(point: str) -> str:
    return point.split()[0]


def size_of(row: Row) -> int:
    return int(row.direction.split()[1])
