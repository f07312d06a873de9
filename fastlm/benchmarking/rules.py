"""What was measured → the rows of a table that say who comes first. Nothing here measures: the same numbers give the same rows.

A backend takes the first place from the one that has it by usual order only where it was clearly the faster: the quartile of the ratio, not its median, is on
its side. What lies within the spread leaves the order as it is. Between two sizes that were measured the nearer one holds, by their ratio.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from fastlm.backends import choice, table
from fastlm.benchmarking.measure import Ratio

CLEARLY = 0.97  # slower than that counts; within it the usual order holds
REACH = 8  # a feature that was measured at one size only: how many times as large and as small a size that still tells something of
FEW = 32  # queries, as of a decoding step: the kernels read keys and values, and have nothing else to do

Range = tuple[int | None, int | None]
Box = dict[str, Range]
Axes = Mapping[
    str, tuple[tuple[Box, tuple[str, ...]], ...]
]  # operator → calls that are measured apart, and the features that tell them, the first one first

GPU_AXES: Axes = {
    "attention": (
        ({"query_len": (None, FEW)}, ("batch", "key_len")),
        ({"query_len": (FEW + 1, None)}, ("masked", "head_dim", "query_len")),
    ),
    "attention_varlen": (({}, ("masked", "query_tokens")),),
    "gelu_mlp": (({}, ("conv1d", "rows")),),
    "layernorm_residual": (({}, ("rows", "width")),),  # rows first: of few, launches decide, whatever the width
    "linear_cross_entropy": (({}, ("rows",)),),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """Who should come first in a call with these features; None: whoever does in the usual order."""

    operator: str
    dtype: str
    features: Mapping[str, int]
    first: str | None


class Measured(Protocol):
    """A row of measurements: of one backend in one direction, beside the others at the same moment."""

    operator: str
    dtype: str
    direction: str
    served_by: str
    features: dict[str, int]
    backends: dict[
        str, dict[str, float]
    ]  # other backend → the ratio's median, low and high: how many times as fast as it


def winner(contests: Sequence[Mapping[str, Mapping[str, Ratio]]], order: Sequence[str]) -> str | None:
    """contests: for each direction, how many times as fast one backend is as another, [one][other]. order: the usual one, of those that took part.

    A backend moves up where it is clearly faster in a direction and clearly slower in none.
    """
    best = order[0]
    for name in order[1:]:
        ratios = [contest[best][name] for contest in contests if name in contest.get(best, {})]
        if any(ratio.high < CLEARLY for ratio in ratios) and not any(ratio.low > 1 / CLEARLY for ratio in ratios):
            best = name
    return None if best == order[0] else best


def points(rows: Sequence[Measured], order: Sequence[str]) -> list[Point]:
    together: dict[tuple, list[Measured]] = {}
    for row in rows:
        together.setdefault((row.operator, row.dtype, *sorted(row.features.items())), []).append(row)
    found = []
    for those in together.values():
        contests: dict[str, dict[str, dict[str, Ratio]]] = {}
        for row in those:
            ratios = {name: Ratio(r["median"], r["low"], r["high"]) for name, r in row.backends.items()}
            contests.setdefault(row.direction, {})[row.served_by] = ratios
        took_part = {row.served_by for row in those}.union(*(row.backends for row in those))
        first = winner(list(contests.values()), [name for name in order if name in took_part])
        found.append(Point(those[0].operator, those[0].dtype, those[0].features, first))
    return found


def of_rows(rows: Sequence[Measured]) -> list[table.Rule]:
    """The rules of a GPU, from rows of operators of GPU_AXES; others say nothing of a choice."""
    return rules(points([row for row in rows if row.operator in GPU_AXES], table.ORDER["cuda"]), GPU_AXES)


def rules(found: Sequence[Point], axes: Axes) -> list[table.Rule]:
    result = []
    for operator, dtype in dict.fromkeys((point.operator, point.dtype) for point in found):
        for box, names in axes[operator]:
            within = table.Rule(operator, dtype, box)
            those = [point for point in found if within.holds(point.operator, point.dtype, dict(point.features))]
            result += [table.Rule(operator, dtype, narrowed(box, where), first) for where, first in cells(those, names)]
    return result


def cells(those: Sequence[Point], axes: Sequence[str]) -> list[tuple[Box, str]]:
    """The boxes around the points where another backend than usual comes first: cut along one feature, and each part along the next. Neighbours that are alike
    are one."""
    if not axes:
        firsts = {point.first for point in those}
        first = firsts.pop() if len(firsts) == 1 else None  # what the axes do not tell apart must agree
        return [({}, first)] if first else []
    axis, *others = axes
    values = sorted({point.features[axis] for point in those})
    parts = [cells([point for point in those if point.features[axis] == value], others) for value in values]
    found, start = [], 0
    for i, part in enumerate(parts):
        if i + 1 < len(parts) and parts[i + 1] == part:
            continue
        ends = edges(values, start, i)
        found += [(narrowed({axis: ends} if ends != (None, None) else {}, where), first) for where, first in part]
        start = i + 1
    return found


def edges(values: Sequence[int], first: int, last: int) -> Range:
    """Of what values[first] … values[last] tell of, among all that were measured: of numbers as far as the next one that was, or REACH without any."""
    whole = first == 0 and last == len(values) - 1
    if isinstance(values[0], bool):
        return (None, None) if whole and len(values) == 2 else (int(values[first]), int(values[last]))
    if len(values) == 1:
        least, most = -(-values[0] // REACH), values[0] * REACH
        return least if least > 1 else None, most
    low = between(values[first - 1], values[first]) + 1 if first > 0 else None
    return low, between(values[last], values[last + 1]) if last + 1 < len(values) else None


def between(low: int, high: int) -> int:
    """The last whole number that is nearer to the lower of two, by ratios."""
    return math.isqrt(low * high)


def narrowed(box: Box, where: Box) -> Box:
    """Both hold."""
    both = dict(box)
    for name, (low, high) in where.items():
        lows, highs = [
            [end for end in ends if end is not None]
            for ends in zip((low, high), both.get(name, (None, None)), strict=True)
        ]
        both[name] = max(lows, default=None), min(highs, default=None)
    return both


# Files


def write(path: pathlib.Path, text: str) -> None:
    """At once: who reads it meanwhile, or kills this process, finds the old file or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def as_json(tables: Mapping[str, Sequence[table.Rule]]) -> str:
    """{CPU or GPU: rules} as the user's cache holds it."""
    return (
        json.dumps({model: [dataclasses.asdict(rule) for rule in found] for model, found in tables.items()}, indent=1)
        + "\n"
    )


def as_python(model: str, found: Sequence[table.Rule], comment: str) -> str:
    """An entry of fastlm/backends/table.py."""

    def line(rule: table.Rule) -> str:
        where = ", ".join(f"{json.dumps(name)}: ({low}, {high})" for name, (low, high) in rule.where.items())
        return f"        Rule({json.dumps(rule.operator)}, {json.dumps(rule.dtype)}, {{{where}}}, {json.dumps(rule.first)}),\n"

    name = json.dumps(model, ensure_ascii=False)
    return (
        f"    # {comment}\n    {name}: (\n{''.join(map(line, found))}    ),\n"
        if found
        else f"    # {comment}\n    {name}: (),\n"
    )


def remember(tables: Mapping[str, Sequence[table.Rule]]) -> None:
    """Into the user's cache, beside what it holds for other machines; from now on, in this process too."""
    path = table.user_table()
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    kept = kept if isinstance(kept, dict) else {}
    kept |= json.loads(as_json(tables))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(kept, indent=1) + "\n")
    table.forget()
    choice.CHOICES.clear()
