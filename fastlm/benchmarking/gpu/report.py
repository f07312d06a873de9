"""GPU measurements as a table and a plot."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastlm
from fastlm.benchmarking.gpu.timing import Row
from fastlm.benchmarking.report import percent

COLUMNS = (
    "operator",
    "shape",
    "dtype",
    "direction",
    "backend",
    "time",
    "TFLOP/s",
    "share of peak",
    "speedup over baselines",
    "speedup over other backends",
)


def describe(device: str, measured: dict[str, float]) -> dict[str, Any]:
    triton = __import__("triton").__version__ if importlib.util.find_spec("triton") else None
    card = torch.cuda.get_device_name() if device == "cuda" else device
    return {"card": card, "fastlm": fastlm.__version__, "torch": torch.__version__, "triton": triton, "peaks": measured}


def share(row: Row, measured: dict[str, float]) -> float | None:
    """The time that memory and matrix units need at least, over the time taken."""
    rate = measured.get(f"{row.dtype}_product_flops_per_second")
    if row.flops is None or rate is None:
        return None
    return max(row.flops / rate, (row.bytes or 0) / measured["copy_bytes_per_second"]) / row.seconds


def ratios(others: dict[str, dict[str, float]]) -> str:
    return "; ".join(f"{name} {r['median']:.2f} [{r['low']:.2f}–{r['high']:.2f}]" for name, r in others.items())


def markdown(
    rows: Sequence[Row], described: dict[str, Any], failed: Sequence[str] = (), left_out: Sequence[str] = ()
) -> str:
    peaks = described["peaks"]
    products = [
        f"{rate / 1e12:,.0f} TFLOP/s in {name.split('_')[0]}"
        for name, rate in peaks.items()
        if name.endswith("flops_per_second")
    ]
    lines = [
        f"{described['card']}, fastlm {described['fastlm']}, PyTorch {described['torch']}, "
        f"Triton {described['triton']}. Copy {peaks['copy_bytes_per_second'] / 1e9:,.0f} GB/s (read plus written); "
        f"matrix product: {', '.join(products)}. Speedups: median [quartiles] of interleaved pairs; torch: PyTorch's "
        "operators behind fastlm's functions. *: selected automatically.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        cells = [
            f"`{row.operator}`",
            row.shape,
            row.dtype,
            row.direction,
            f"{row.backend}{'*' if row.auto else ''}",
            f"{row.seconds * 1e6:,.1f} µs",
            f"{row.flops / row.seconds / 1e12:.1f}" if row.flops else "–",
            percent(share(row, peaks)),
            ratios(row.baselines),
            ratios(row.backends),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if row.peak_bytes:
            own = row.peak_bytes[row.backend]
            words = [
                f"{name} {taken / 2**30:.2f} GiB ({own / max(taken, 1):.0%})" for name, taken in row.peak_bytes.items()
            ]
            memory = ["", "peak memory of the step (this row's, relative to it)", *[""] * 6, ", ".join(words), ""]
            lines.append(f"| {' | '.join(memory)} |")
    for title, what in (("Failed", failed), ("Left out, as the time ran out", left_out)):
        if what:
            lines += ["", f"{title}:", "", *(f"- {line}" for line in what)]
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: Sequence[Row], described: dict[str, Any]) -> None:
    """The speedup over the best baseline, and the share of the peak."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.baselines]
    figure = Figure(figsize=(13, max(4, 1.5 + 0.3 * len(rows))), dpi=110, layout="constrained")
    shares = [100 * (share(row, described["peaks"]) or 0) for row in rows]
    left, *right = figure.subplots(1, 2 if any(shares) else 1, sharey=True, squeeze=False)[0]
    places = range(len(rows))
    best = [min(row.baselines.values(), key=lambda r: r["seconds"]) for row in rows]
    spread = [[r["median"] - r["low"] for r in best], [r["high"] - r["median"] for r in best]]
    left.barh(places, [r["median"] for r in best], xerr=spread, color="#08519c")
    left.axvline(1, color="#d94801")
    names = [f"{row.operator} {row.direction}, {row.dtype}, {row.backend}\n{row.shape}" for row in rows]
    left.set_yticks(places, names, fontsize=7)
    left.invert_yaxis()
    left.set(title="speedup", xlabel="speedup over the fastest of PyTorch and flash-attn (line: equal)")
    for panel in right:
        panel.barh(places, shares, color="#238b45")
        panel.set(title="share of peak", xlabel="% of what memory and matrix units allow")
    figure.suptitle(f"{described['card']}, fastlm {described['fastlm']}, PyTorch {described['torch']}", fontsize=11)
    figure.savefig(path)
