"""Rows as a picture: how many times as fast, how near to the machine's roof, how much memory, how it grows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlm.benchmarking import growth
from fastlm.benchmarking.compare import Row

OURS, THEIRS = "#08519c", "#d94801"


def draw(path: Path, rows: Sequence[Row], described: dict[str, Any]) -> None:
    from matplotlib.figure import Figure  # a figure of its own: no window, no global state

    growing, others = ([row for row in rows if (row.operator == "growth") == wanted] for wanted in (True, False))
    mosaic: list[Any] = [["throughput", "roofline"], ["throughput", "memory"]] if others or not growing else []
    heights = [max(5.5, 3 + 0.22 * len(others)) / 2] * len(mosaic)
    if growing:
        mosaic, heights = [*mosaic, ["context", "width"]], [*heights, 4.5]
    figure = Figure(figsize=(13, sum(heights)), dpi=110, layout="constrained")
    panels = figure.subplot_mosaic(mosaic, width_ratios=(3, 2) if len(mosaic) > 1 else (1, 1), height_ratios=heights)
    if "throughput" in panels:
        throughput(panels["throughput"], others)
        roofline(panels["roofline"], others, described)
        memory(panels["memory"], others)
    for series in growth.SERIES if growing else ():
        grown(panels[series], series, [row for row in growing if growth.series_of(row.direction) == series])
    figure.suptitle(f"{described['cpu']}, fastlm {described['fastlm']}, PyTorch {described['torch']}", fontsize=11)
    figure.savefig(path)


def throughput(axes, rows: Sequence[Row]) -> None:
    """The ratio against the best rival, with its quartiles."""
    best = [row.rivals[row.best_rival].ratio for row in rows]
    places = range(len(rows))
    spread = [[r.median - r.low for r in best], [r.high - r.median for r in best]]
    axes.barh(places, [r.median for r in best], xerr=spread, color=OURS, ecolor="#636363", height=0.7)
    axes.axvline(1, color=THEIRS, linewidth=1.2)
    axes.set_yticks(places, [f"{row.operator} {row.direction}, {row.dtype}, {row.threads}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(title="throughput", xlabel="times as fast as the best of PyTorch (line: equal)")
    axes.grid(axis="x", alpha=0.3)


def roofline(axes, rows: Sequence[Row], described: dict[str, Any]) -> None:
    """FLOP/s over FLOPs per byte, below the roof that memory and arithmetic are (Williams et al., 2009), at the highest number of threads."""
    measured = [(row, row.work) for row in rows if row.work]
    axes.set(title="roofline", xlabel="FLOPs per byte", ylabel="GFLOP/s", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if not measured:
        return
    threads = max(row.threads for row, _ in measured)
    peaks = described["peaks"][str(threads)]
    shown = [(row, work.flops / work.bytes, work.flops) for row, work in measured if row.threads == threads]
    lowest, highest = min(i for _, i, _ in shown), max(i for _, i, _ in shown)
    for dtype, colour in (("float32", OURS), ("bfloat16", "#238b45")):
        top = peaks.get(f"{dtype}_flops_per_second")
        if top is None:
            continue
        knee = top / peaks["read_bytes_per_second"]
        left, right = min(lowest, knee) / 2, max(highest, knee) * 2
        axes.plot(
            [left, knee, right],
            [left * peaks["read_bytes_per_second"] / 1e9, top / 1e9, top / 1e9],
            color=colour,
            linewidth=1,
            label=f"roof, {dtype}",
        )
        mine = [(i, flops / row.seconds / 1e9) for row, i, flops in shown if row.dtype == dtype]
        theirs = [
            (i, flops / row.rivals[row.best_rival].seconds / 1e9) for row, i, flops in shown if row.dtype == dtype
        ]
        axes.scatter(*zip(*mine, strict=True), color=colour, s=18, label=f"fastlm, {dtype}")
        axes.scatter(*zip(*theirs, strict=True), edgecolor=colour, facecolor="none", s=18, label=f"PyTorch, {dtype}")
    axes.legend(fontsize=7, frameon=False)


def memory(axes, rows: Sequence[Row]) -> None:
    """What the allocator held at most, ours beside PyTorch's."""
    shown = list(
        {(row.operator, row.dtype): row for row in rows if row.bytes_held and row.rivals["eager"].bytes}.values()
    )
    places = range(len(shown))
    axes.bar([p - 0.2 for p in places], [row.bytes_held / 1e6 for row in shown], width=0.4, color=OURS, label="fastlm")  # type: ignore[operator]
    axes.bar(
        [p + 0.2 for p in places],
        [row.rivals["eager"].bytes / 1e6 for row in shown],
        width=0.4,
        color=THEIRS,
        label="PyTorch",
    )  # type: ignore[operator]
    axes.set_xticks(places, [f"{row.operator}\n{row.dtype}" for row in shown], rotation=30, ha="right", fontsize=7)
    axes.set(title="memory", ylabel="MB at most", yscale="log", ylim=(1, None))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7, frameon=False)


def grown(axes, series: str, rows: Sequence[Row]) -> None:
    """Time for a token over the size, both by powers of two: arithmetic alone is a smooth curve."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set(title=f"time for a token against {series}", xlabel=series, ylabel="µs")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for (dtype, threads), style in zip(
        dict.fromkeys((row.dtype, row.threads) for row in rows), ("-", "--", ":", "-."), strict=False
    ):
        some = sorted((row for row in rows if (row.dtype, row.threads) == (dtype, threads)), key=growth.size_of)
        sizes = [growth.size_of(row) for row in some]
        kind = f"{dtype}, {threads} thread{'s' * (threads > 1)}"
        axes.plot(
            sizes,
            [row.seconds / row.tokens * 1e6 for row in some],
            style,
            marker="o",
            markersize=4,
            color=OURS,
            label=f"fastlm, {kind}",
        )  # type: ignore[operator]
        for name, colour in zip(some[0].rivals, (THEIRS, "#fdae6b", "#636363", "#bdbdbd"), strict=False):
            times = [row.rivals[name].seconds / row.tokens * 1e6 for row in some]  # type: ignore[operator]
            axes.plot(sizes, times, style, marker="o", markersize=3, color=colour, linewidth=1, label=f"{name}, {kind}")
    sizes = sorted({growth.size_of(row) for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
