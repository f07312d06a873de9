"""Derives rows of the selection table from measurements. The same numbers give the same rows.

A backend is moved before the one that the usual order prefers only where it was clearly faster: the quartile of the
ratio, not the median, says so. Within the spread the usual order holds. Between two measured sizes the nearer one
decides, by their ratio.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from fastlm.backends import table
from fastlm.backends.rule import Rule
from fastlm.benchmarking.compare import Row
from fastlm.benchmarking.measure import Ratio
from fastlm.ops.benchmark import Axes, Range

CLEARLY = 0.97  # a speedup below this is clearly slower
REACH = 8  # how far a size measured alone reaches, as a factor in both directions

Box = Mapping[str, Range]


@dataclasses.dataclass(frozen=True)
class Point:
    """The backend that a call with these sizes should prefer; None: the first of the usual order."""

    operator: str
    dtype: str
    sizes: Mapping[str, int]
    first: str | None


def winner(ratios: Sequence[Mapping[str, Mapping[str, Ratio]]], order: Sequence[str]) -> str | None:
    """The backend to prefer; None: the first of the order.

    A backend takes the lead if it is clearly faster in one direction and clearly slower in none.

    Args:
        ratios: for each direction, the speedup of one backend over another, [one][other].
        order: the usual one, of the backends that were measured.
    """
    best = order[0]
    for name in order[1:]:
        against = [each[best][name] for each in ratios if name in each.get(best, {})]
        if any(ratio.high < CLEARLY for ratio in against) and not any(ratio.low > 1 / CLEARLY for ratio in against):
            best = name
    return None if best == order[0] else best


def points(rows: Sequence[Row], order: Sequence[str]) -> list[Point]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.operator, row.dtype, *sorted(row.sizes.items())), []).append(row)
    found = []
    for group in groups.values():
        ratios: dict[str, dict[str, dict[str, Ratio]]] = {}
        for row in group:
            own = {name: other.ratio for name, other in row.backends.items()}
            ratios.setdefault(row.direction, {})[row.backend] = own
        measured = {row.backend for row in group}.union(*(row.backends for row in group))
        if ordered := [name for name in order if name in measured]:
            first = winner(list(ratios.values()), ordered)
            found.append(Point(group[0].operator, group[0].dtype, group[0].sizes, first))
    return found


def rules_of(rows: Sequence[Row], axes: Mapping[str, Axes], device: str) -> list[Rule]:
    """The rows of the table for a CPU or a GPU; measurements of other things than the operators in axes are skipped."""
    return derive(points([row for row in rows if row.operator in axes], table.ORDER[device]), axes)


def derive(found: Sequence[Point], axes: Mapping[str, Axes]) -> list[Rule]:
    rules = []
    for operator, dtype in dict.fromkeys((point.operator, point.dtype) for point in found):
        own = [point for point in found if (point.operator, point.dtype) == (operator, dtype)]
        for box, names in axes[operator]:
            inside = [point for point in own if all(in_range(point.sizes[name], *box[name]) for name in box)]
            rules += [Rule(operator, dtype, intersection(box, where), first) for where, first in cells(inside, names)]
    return rules


def in_range(size: int, low: int | None, high: int | None) -> bool:
    return (low is None or size >= low) and (high is None or size <= high)


def cells(inside: Sequence[Point], axes: Sequence[str]) -> list[tuple[dict[str, Range], str]]:
    """The boxes around the points that prefer another backend than usual.

    The points are cut along one size, each part along the next; equal neighbours are merged.
    """
    if not axes:
        preferred = {point.first for point in inside}
        first = preferred.pop() if len(preferred) == 1 else None  # points that the axes do not distinguish must agree
        return [({}, first)] if first else []
    axis, *others = axes
    values = sorted({point.sizes[axis] for point in inside})
    parts = [cells([point for point in inside if point.sizes[axis] == value], others) for value in values]
    found, start = [], 0
    for i, part in enumerate(parts):
        if i + 1 < len(parts) and parts[i + 1] == part:
            continue
        ends = edges(values, start, i)
        found += [(intersection({axis: ends} if ends != (None, None) else {}, where), first) for where, first in part]
        start = i + 1
    return found


def edges(values: Sequence[int], first: int, last: int) -> Range:
    """The range that values[first] … values[last] represent among all measured values.

    It ends halfway to the next measured value, by ratio; with one value alone it reaches a factor of REACH.
    """
    whole = first == 0 and last == len(values) - 1
    if isinstance(values[0], bool):
        return (None, None) if whole and len(values) == 2 else (int(values[first]), int(values[last]))
    if len(values) == 1:
        least, most = -(-values[0] // REACH), values[0] * REACH
        return least if least > 1 else None, most
    low = halfway(values[first - 1], values[first]) + 1 if first > 0 else None
    return low, halfway(values[last], values[last + 1]) if last + 1 < len(values) else None


def halfway(low: int, high: int) -> int:
    """The last integer that is nearer to the lower of two, by ratio."""
    return math.isqrt(low * high)


def intersection(box: Box, where: Box) -> dict[str, Range]:
    both = dict(box)
    for name, (low, high) in where.items():
        lows, highs = [
            [end for end in ends if end is not None]
            for ends in zip((low, high), both.get(name, (None, None)), strict=True)
        ]
        both[name] = max(lows, default=None), min(highs, default=None)
    return both
