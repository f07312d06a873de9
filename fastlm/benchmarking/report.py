"""Rows as tables on the screen, as JSON and as Markdown."""

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table

import fastlm
from fastlm.benchmarking.compare import DTYPES, Row
from fastlm.benchmarking.machine import peak, product, read_bandwidth
from fastlm.ops.benchmark import DIRECTIONS


def machine(numbers_of_threads: Sequence[int], dtypes: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions, and the peaks that the shares refer to."""
    found = fastlm.info()
    return {
        "cpu": found.cpu,
        "isa": found.isa,
        "fastlm": found.version,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "peaks": {
            str(n): {
                "read_bytes_per_second": read_bandwidth(n),
                **{f"{d}_flops_per_second": peak(n, DTYPES[d]) for d in dtypes},
                **{f"{d}_product_flops_per_second": product(n, DTYPES[d])[1] for d in dtypes},
            }
            for n in numbers_of_threads
        },
    }


def peaks_in_words(described: dict[str, Any]) -> list[str]:
    """One line per number of threads."""
    lines = []
    for n, peaks in described["peaks"].items():
        words = [f"reads {peaks['read_bytes_per_second'] / 1e9:.1f} GB/s"]
        for d in DTYPES:
            if f"{d}_flops_per_second" in peaks:
                rate, reached = peaks[f"{d}_flops_per_second"], peaks[f"{d}_product_flops_per_second"]
                share = f"PyTorch's matrix product reaches {reached / rate:.0%}"
                words.append(f"multiply-adds {rate / 1e9:,.0f} GFLOP/s in {d}, of which {share}")
        lines.append(f"{n} thread{'s' * (n != '1')}: {'; '.join(words)}")
    return lines


def seconds_in_words(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def percent(share: float | None, missing: str = "–") -> str:
    return missing if share is None else f"{share:.0%}"


# The screen: column → minimum width
OPERATOR_COLUMNS = {
    "dtype": 8,
    "threads": 7,
    "direction": 8,
    "fastlm": 6,
    "baseline": 8,
    "speedup": 16,
    "peak": 4,
    "by": 3,
}
RIGHT = ("threads", "level", "fastlm", "peak", "memory")


def columns_of(row: Row) -> dict[str, int]:
    """The columns of the table that a row is in."""
    if row.tokens is None:
        return OPERATOR_COLUMNS
    columns = {"dtype": 8, "threads": 7}
    if row.operator == "growth":
        columns["size"] = 12
    elif row.recompute is not None:
        columns["level"] = 5
    columns |= {"fastlm": 7, "baseline": 8, "speedup": 16}
    if row.share is not None:
        columns["peak"] = 4
    return columns | ({"memory": 6} if row.bytes_held else {"by": 3})


def screen_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One per operator, with a line per baseline; at most 80 columns wide."""
    for operator, shape in dict.fromkeys((row.operator, row.shape) for row in rows):
        own = [row for row in rows if (row.operator, row.shape) == (operator, shape)]
        columns = columns_of(own[0])
        table = Table(
            title=f"{operator}: {shape}",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        if "by" not in columns:
            table.caption, table.caption_justify = f"by {', '.join(sorted({row.backend for row in own}))}", "left"
        for column, width in columns.items():
            table.add_column(column, min_width=width, justify="right" if column in RIGHT else "left")
        for row in own:
            for line in screen_lines(row):
                table.add_row(*(line.get(column, "") for column in columns))
        yield table


def screen_lines(row: Row) -> Iterator[dict[str, str]]:
    for i, (name, baseline) in enumerate(row.baselines.items()):
        line = {"baseline": name, "speedup": str(baseline.ratio)}
        if row.bytes_held and baseline.bytes:
            line["memory"] = f"{row.bytes_held / baseline.bytes:.2f}"
        if i == 0:
            line |= {
                "dtype": row.dtype,
                "threads": str(row.threads),
                "direction": row.direction.replace("forward+backward", "both"),
                "size": row.direction,
                "level": str(row.recompute),
                "fastlm": seconds_in_words(row.seconds) if row.tokens is None else f"{row.tokens / row.seconds:,.0f}/s",
                "peak": percent(row.share, ""),
                "by": row.backend,
            }
        yield line


# Markdown


def markdown(rows: Sequence[Row], described: dict[str, Any]) -> str:
    """Operators with a column per direction, then whole steps and generation with a column per baseline."""
    lines = [
        f"{described['cpu']}, fastlm {described['fastlm']} ({described['isa']}), PyTorch {described['torch']}. "
        "Speedup over PyTorch: median [quartiles] of interleaved pairs. Share of the machine's peak (multiply-adds or "
        "read bandwidth), measured in the same rounds. Peak memory of a call, and error against float64: relative to "
        "PyTorch's.",
        "",
        *(["```", described["command"], "```", ""] if "command" in described else []),
        *[f"- {line}" for line in peaks_in_words(described)],
        "",
        *operator_table([row for row in rows if row.tokens is None]),
    ]
    for kind, shape in dict.fromkeys((row.operator, row.shape) for row in rows if row.tokens is not None):
        lines += whole_table([row for row in rows if (row.operator, row.shape) == (kind, shape)])
    return "\n".join(lines) + "\n"


def operator_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "| operator | dtype | threads | forward | backward | forward + backward "
        "| share of peak, forward / backward | memory | error | backend |",
        "|" + "---|" * 10,
    ]
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.operator, row.dtype, row.threads), {})[row.direction] = row
    for (operator, dtype, threads), by in groups.items():
        shown = {"forward+backward": by["step"]} if "step" in by else by  # an optimizer has one direction
        speedups = [speedup_over_best(shown[d]) if d in shown else "–" for d in DIRECTIONS]
        shares = (
            percent(by["step"].share)
            if "step" in by
            else " / ".join(percent(by[d].share) if d in by else "–" for d in DIRECTIONS[:2])
        )
        whole = by.get("forward+backward")
        error = f"{whole.error:.2f}" if whole and whole.error is not None else "–"
        backends = ", ".join(sorted({row.backend for row in by.values()}))
        cells = [f"`{operator}`", dtype, threads, *speedups, shares, relative_memory(whole), error, backends]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def whole_table(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    names = list(dict.fromkeys(name for row in rows for name in row.baselines))
    variable = "size" if first.operator == "growth" else "recompute"
    speedups = " | ".join(f"speedup over {name}" for name in names)
    lines = [
        "",
        f"{first.operator.replace('_', ' ')}: {first.shape}",
        "",
        f"| dtype | threads | {variable} | fastlm | share of peak | {speedups} | memory | relative to eager |",
        "|" + "---|" * (7 + len(names)),
    ]
    for row in rows:
        assert row.tokens is not None
        varies = row.direction if variable == "size" else "–" if row.recompute is None else row.recompute
        ratios = [str(row.baselines[name].ratio) if name in row.baselines else "–" for name in names]
        megabytes = f"{row.bytes_held / 1e6:,.0f} MB" if row.bytes_held else "–"
        speed = f"{row.tokens / row.seconds:,.1f} tokens/s"
        cells = [row.dtype, row.threads, varies, speed, percent(row.share), *ratios, megabytes, relative_memory(row)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def relative_memory(row: Row | None) -> str:
    eager = row and row.baselines.get("eager")
    return f"{row.bytes_held / eager.bytes:.2f}" if row and row.bytes_held and eager and eager.bytes else "–"


def speedup_over_best(row: Row) -> str:
    name = row.best_baseline
    return f"{row.baselines[name].ratio}" + (f" ({name})" if name != "eager" else "")


def as_json(rows: Sequence[Row], described: dict[str, Any]) -> dict[str, Any]:
    return {"machine": described, "rows": [row.as_dict() for row in rows]}
