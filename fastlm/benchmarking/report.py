"""Rows as a table on the screen, as JSON, as Markdown."""

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table

import fastlm
from fastlm.benchmarking.compare import DTYPES, Row
from fastlm.benchmarking.machine import peak, product, read_bandwidth
from fastlm.benchmarking.operators import DIRECTIONS


def machine(numbers_of_threads: Sequence[int], dtypes: Sequence[str]) -> dict[str, Any]:
    """What ran, on what, and the peaks that the shares refer to."""
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
                words.append(
                    f"multiply-adds {rate / 1e9:,.0f} GFLOP/s in {d}, PyTorch's product {reached / rate:.0%} of it"
                )
        lines.append(f"{n} thread{'s' * (n != '1')}: {'; '.join(words)}")
    return lines


def seconds_in_words(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def screen_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One per operator, a line per rival, narrow enough for a terminal of 80 columns."""
    for operator, shape in dict.fromkeys((row.operator, row.shape) for row in rows):
        table = Table(
            title=f"{operator}: {shape}",
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        mine = [row for row in rows if (row.operator, row.shape) == (operator, shape)]
        columns = [
            ("dtype", 8),
            ("threads", 7),
            ("direction", 8),
            ("fastlm", 6),
            ("against", 5),
            ("times as fast", 16),
            ("peak", 4),
            ("by", 3),
        ]
        if (
            mine[0].tokens is not None
        ):  # a whole step or generation: there is one direction, and no peak was counted of the latter
            columns = [c for c in columns if c[0] != "direction" and (c[0] != "peak" or mine[0].share is not None)]
            columns[2] = ("fastlm", 7)
            if mine[0].bytes_held:
                columns[-1:] = [("memory", 6)]  # in place of who served, which then stands below
                if mine[0].operator == "growth":
                    columns[2:2] = [("size", 12)]
                elif mine[0].recompute is not None:
                    columns[2:2] = [("level", 5)]
                table.caption, table.caption_justify = f"by {', '.join(sorted({row.backend for row in mine}))}", "left"
        for column, width in columns:
            table.add_column(
                column,
                min_width=width,
                justify="right" if column in ("threads", "level", "fastlm", "peak", "memory") else "left",
            )
        for row in mine:
            time = seconds_in_words(row.seconds) if row.tokens is None else f"{row.tokens / row.seconds:,.0f}/s"
            for i, (name, rival) in enumerate(row.rivals.items()):
                line = {"against": name, "times as fast": str(rival.ratio)}
                if i == 0:
                    line |= {"dtype": row.dtype, "threads": str(row.threads), "fastlm": time, "by": row.backend}
                    line["direction"] = row.direction.replace("forward+backward", "both")
                    line["size"] = row.direction
                    line["level"] = str(row.recompute)
                    line["peak"] = "" if row.share is None else f"{row.share:.0%}"
                if row.bytes_held and rival.bytes:
                    line["memory"] = f"{row.bytes_held / rival.bytes:.2f}"
                table.add_row(*(line.get(column, "") for column, _ in columns))
        yield table


def markdown(rows: Sequence[Row], described: dict[str, Any]) -> str:
    """Operators with a column per direction, then whole steps and generations with one per rival."""
    lines = [
        f"{described['cpu']}, fastlm {described['fastlm']} ({described['isa']}), PyTorch {described['torch']}. "
        "How many times as fast as PyTorch: median [quartiles] of pairs timed in turn; so is what a share of the peak is of, multiply-adds or reading. "
        "Memory that a call holds at most, and error against float64: over PyTorch's own.",
        "",
        *[f"- {line}" for line in peaks_in_words(described)],
        "",
    ]
    operators = [row for row in rows if row.tokens is None]
    if operators:
        lines += [
            "| operator | dtype | threads | forward | backward | forward + backward | of peak, forward / backward | memory | error | served by |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    groups: dict[tuple, dict[str, Row]] = {}
    for row in operators:
        groups.setdefault((row.operator, row.dtype, row.threads), {})[row.direction] = row
    for (operator, dtype, threads), by in groups.items():
        by = by | {"forward+backward": by["step"]} if "step" in by else by  # an optimiser has but one figure
        cells = [against_best(by[d]) if d in by else "–" for d in DIRECTIONS]
        shares = (
            f"{by['step'].share:.0%}"
            if "step" in by
            else " / ".join(f"{by[d].share:.0%}" if d in by else "–" for d in DIRECTIONS[:2])
        )
        whole = by.get("forward+backward")
        memory = (
            f"{whole.bytes_held / whole.rivals['eager'].bytes:.2f}"
            if whole and whole.bytes_held and whole.rivals["eager"].bytes
            else "–"
        )
        error = f"{whole.error:.2f}" if whole and whole.error is not None else "–"
        served = ", ".join(sorted({row.backend for row in by.values()}))
        lines.append(
            f"| `{operator}` | {dtype} | {threads} | {' | '.join(cells)} | {shares} | {memory} | {error} | {served} |"
        )
    for kind, shape in dict.fromkeys((row.operator, row.shape) for row in rows if row.tokens is not None):
        some = [row for row in rows if (row.operator, row.shape) == (kind, shape)]
        names = list(dict.fromkeys(name for row in some for name in row.rivals))
        lines += ["", f"{kind.replace('_', ' ')}: {shape}", ""]
        varies = "recompute" if kind != "growth" else "size"
        lines += [
            f"| dtype | threads | {varies} | fastlm | of peak | {' | '.join(f'against {name}' for name in names)} | memory | over eager's |",
            "|---" * (7 + len(names)) + "|",
        ]
        for row in some:
            cells = [str(row.rivals[name].ratio) if name in row.rivals else "–" for name in names]
            share = "–" if row.share is None else f"{row.share:.0%}"
            eager = row.rivals["eager"].bytes if "eager" in row.rivals else None
            memory = f"{row.bytes_held / eager:.2f}" if row.bytes_held and eager else "–"
            megabytes = f"{row.bytes_held / 1e6:,.0f} MB" if row.bytes_held else "–"
            level = row.direction if kind == "growth" else "–" if row.recompute is None else row.recompute
            speed = f"{row.tokens / row.seconds:,.1f} tokens/s"  # type: ignore[operator]
            lines.append(
                f"| {row.dtype} | {row.threads} | {level} | {speed} | {share} | {' | '.join(cells)} | {megabytes} | {memory} |"
            )
    return "\n".join(lines) + "\n"


def against_best(row: Row) -> str:
    name = row.best_rival
    return f"{row.rivals[name].ratio}" + (f" ({name})" if name != "eager" else "")


def as_json(rows: Sequence[Row], described: dict[str, Any]) -> dict[str, Any]:
    return {"machine": described, "rows": [row.as_dict() for row in rows]}
