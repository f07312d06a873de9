"""The tables that fastlm bench prints."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from fastlm.benchmarking.compare import Row
from fastlm.benchmarking.report import percent

# column → minimum width
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


def seconds_in_words(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
