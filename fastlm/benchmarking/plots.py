"""Rows as a plot: speedups, a roofline, memory, and growth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlm.benchmarking.compare import Row
from fastlm.benchmarking.report import gpu_share
from fastlm.training import bench as growth

OURS, BASELINE = "#08519c", "#d94801"
COLORS = {"float32": OURS, "bfloat16": "#238b45"}
OTHER_BASELINES = ("#fdae6b", "#636363", "#bdbdbd")

PALETTE = 256  # colours of a PNG, which has less than half the size then


def draw(path: Path, figure: Any) -> None:
    figure.savefig(path)
    if path.suffix.lower() == ".png":
        from PIL import Image  # which matplotlib needs

        with Image.open(path) as image:
            fewer = image.convert("RGB").quantize(PALETTE)
        fewer.save(path, optimize=True)


def figure_of(rows: Sequence[Row], described: dict[str, Any]) -> Any:
    """A matplotlib figure with the panels that the rows have data for; at least one row."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    growing = [row for row in rows if row.operator == "growth"]
    others = [row for row in rows if row.operator != "growth"]
    right = [name for name, has in (("roofline", has_flops), ("memory", has_memory)) if any(map(has, others))]
    mosaic: list[Any] = [["speedup", name] for name in right] or [["speedup"] * 2] if others else []
    height = max(5.5 if len(right) > 1 else 3, 2.2 + 0.22 * len(others))
    heights = [height / len(mosaic) for _ in mosaic]
    series = [name for name in growth.SERIES if any(growth.series_of(row.direction) == name for row in growing)]
    if series:
        mosaic, heights = [*mosaic, series if len(series) == 2 else series * 2], [*heights, 5.5]
    figure = Figure(figsize=(13, sum(heights)), dpi=110, layout="constrained")
    panels = figure.subplot_mosaic(mosaic, width_ratios=(3, 2) if others else (1, 1), height_ratios=heights)
    if others:
        names = [f"{label(row)}, {row.dtype}, {threads_of(row)}" for row in others]
        draw_speedups(panels["speedup"], others, names, "the fastest baseline of PyTorch")
    if "roofline" in panels:
        draw_roofline(panels["roofline"], others, described)
    if "memory" in panels:
        draw_memory(panels["memory"], others)
    for name in series:
        draw_growth(panels[name], name, [row for row in growing if growth.series_of(row.direction) == name])
    entitle(figure, described["cpu"], described)
    return figure


def figure_of_gpu(rows: Sequence[Row], described: dict[str, Any]) -> Any:
    """The speedup over the best baseline, and the share of the peak; one row with baselines at least."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.baselines]
    shares = [100 * (gpu_share(row, described["peaks"]) or 0) for row in rows]
    figure = Figure(figsize=(13, max(4, 1.5 + 0.3 * len(rows))), dpi=110, layout="constrained")
    left, *right = figure.subplots(1, 2 if any(shares) else 1, sharey=True, squeeze=False)[0]
    names = [f"{row.operator} {row.direction}, {row.dtype}, {row.backend}\n{row.shape}" for row in rows]
    draw_speedups(left, rows, names, "the fastest of PyTorch and flash-attn")
    for panel in right:
        panel.barh(range(len(rows)), shares, color=COLORS["bfloat16"])
        panel.set(title="share of peak", xlabel="% of what memory and matrix units allow")
    entitle(figure, described["card"], described)
    return figure


def entitle(figure: Any, machine: str, described: dict[str, Any]) -> None:
    figure.suptitle(f"{machine}, fastlm {described['fastlm']}, PyTorch {described['torch']}", fontsize=11)


def has_flops(row: Row) -> bool:
    return row.work is not None and row.work.flops > 0


def has_memory(row: Row) -> bool:
    eager = row.baselines.get("eager")
    return bool(row.bytes_held and eager and eager.bytes)


def label(row: Row) -> str:
    """What a bar is of: an operator and its direction, or a whole run and its sizes."""
    return f"{row.operator}, {row.direction}" if row.tokens is None else f"{row.operator}: {row.shape}"


def draw_speedups(axes: Any, rows: Sequence[Row], names: Sequence[str], baseline: str) -> None:
    """The speedup over the best baseline, with its quartiles."""
    ratios = [row.speedup for row in rows]
    places = range(len(rows))
    spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    colors = [COLORS.get(row.dtype, OURS) for row in rows]
    axes.barh(places, [r.median for r in ratios], xerr=spread, color=colors, ecolor="#636363", height=0.7)
    for place, ratio in zip(places, ratios, strict=True):
        write(axes, ratio.high, place, f"{ratio.median:.2f}")
    axes.axvline(1, color=BASELINE, linewidth=1.2)
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.16, y=0.01)  # on the right, for the text after the longest bar
    axes.set(title="speedup", xlabel=f"speedup over {baseline} (line: equal)")
    axes.grid(axis="x", alpha=0.3)


def write(axes: Any, x: float, y: float, text: str) -> None:
    """Text to the right of a bar, readable where it crosses a line."""
    offset = {"xytext": (4, 0), "textcoords": "offset points"}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.annotate(text, (x, y), **offset, va="center", fontsize=7, bbox=box)


def threads_of(row: Row) -> str:
    return f"{row.threads} thread{'s' * (row.threads != 1)}"


def draw_roofline(axes: Any, rows: Sequence[Row], described: dict[str, Any]) -> None:
    """FLOP/s by FLOPs per byte, under the limits of memory and arithmetic (Williams et al., 2009).

    Only cases with matrix products, at the highest number of threads.
    """
    from matplotlib.ticker import NullFormatter

    axes.set(title="roofline", xlabel="FLOPs per byte", ylabel="GFLOP/s", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.xaxis.set_minor_formatter(NullFormatter())  # less than a decade would have overlapping labels
    measured = [(row, row.work) for row in rows if row.work and row.work.flops]
    if not measured:
        return
    threads = max(row.threads or 0 for row, _ in measured)
    peaks = described["peaks"][str(threads)]
    bandwidth = peaks["read_bytes_per_second"]
    shown = [(row, work.flops / work.bytes, work.flops) for row, work in measured if row.threads == threads]
    lowest, highest = min(i for _, i, _ in shown), max(i for _, i, _ in shown)
    for dtype, color in COLORS.items():
        top = peaks.get(f"{dtype}_flops_per_second")
        own = [(row, intensity, flops) for row, intensity, flops in shown if row.dtype == dtype]
        if top is None or not own:
            continue
        knee = top / bandwidth
        left, right = min(lowest, knee) / 2, max(highest, knee) * 2
        roof = [left * bandwidth / 1e9, top / 1e9, top / 1e9]
        axes.plot([left, knee, right], roof, color=color, linewidth=1, label=f"limit, {dtype}")
        ours = [(i, flops / row.seconds / 1e9) for row, i, flops in own]
        fastest = [(i, min(b.seconds for b in row.baselines.values()), flops) for row, i, flops in own]
        baselines = [(i, flops / seconds / 1e9) for i, seconds, flops in fastest]
        axes.scatter(*zip(*ours, strict=True), color=color, s=18, label=f"fastlm, {dtype}")
        style = {"edgecolor": color, "facecolor": "none", "s": 18}
        axes.scatter(*zip(*baselines, strict=True), **style, label=f"PyTorch, {dtype}")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))  # beside the panel


def draw_memory(axes: Any, rows: Sequence[Row]) -> None:
    """Peak memory relative to PyTorch eager's, at the highest number of threads."""
    threads = max(row.threads or 0 for row in rows if has_memory(row))
    shown = [row for row in rows if has_memory(row) and row.threads == threads]
    places = range(len(shown))
    shares = [(row.bytes_held or 0) / (row.baselines["eager"].bytes or 1) for row in shown]
    axes.barh(places, shares, color=[COLORS.get(row.dtype, OURS) for row in shown], height=0.7)
    for place, row, share in zip(places, shown, shares, strict=True):
        write(axes, share, place, f"{share:.2f} ({(row.bytes_held or 0) / 1e6:,.0f} MB)")
    axes.axvline(1, color=BASELINE, linewidth=1.2)
    axes.set_yticks(places, [f"{label(row).partition(',')[0]}, {row.dtype}" for row in shown], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.55, y=0.01)
    axes.set(title="peak memory", xlabel="relative to PyTorch eager (line: equal)")
    axes.grid(axis="x", alpha=0.3)


def draw_growth(axes: Any, series: str, rows: Sequence[Row]) -> None:
    """Time per token by size, both on logarithmic axes, where arithmetic alone is a smooth curve."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set(title=f"time per token by {series}", xlabel=series, ylabel="µs")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    kinds = dict.fromkeys((row.dtype, row.threads) for row in rows)
    for (dtype, threads), style in zip(kinds, ("-", "--", ":", "-."), strict=False):
        own = sorted(
            (row for row in rows if (row.dtype, row.threads) == (dtype, threads)),
            key=lambda row: growth.size_of(row.direction),
        )
        sizes = [growth.size_of(row.direction) for row in own]
        kind = f"{dtype}, {threads_of(own[0])}"
        times = [row.seconds / (row.tokens or 1) * 1e6 for row in own]
        axes.plot(sizes, times, style, marker="o", markersize=4, color=OURS, label=f"fastlm, {kind}")
        for name, color in zip(own[0].baselines, (BASELINE, *OTHER_BASELINES), strict=False):
            times = [row.baselines[name].seconds / (row.tokens or 1) * 1e6 for row in own]
            axes.plot(sizes, times, style, marker="o", markersize=3, color=color, linewidth=1, label=f"{name}, {kind}")
    sizes = sorted({growth.size_of(row.direction) for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 6}  # font sizes below the panel
    axes.legend(fontsize=7, ncols=2, frameon=False, **below)
