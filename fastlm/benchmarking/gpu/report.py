"""What was measured, as a table and a plot."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastlm
from fastlm.benchmarking.gpu.timing import Row


def describe(device: str, measured: dict[str, float]) -> dict[str, Any]:
    triton = __import__("triton").__version__ if importlib.util.find_spec("triton") else None
    card = torch.cuda.get_device_name() if device == "cuda" else device
    return {"card": card, "fastlm": fastlm.__version__, "torch": torch.__version__, "triton": triton, "peaks": measured}


def share(one: Row, measured: dict[str, float]) -> float | None:
    """Of the roof: the time that memory and matrix units need at least, over the time it took."""
    rate = measured.get(f"{one.dtype}_product_flops_per_second")
    if one.flops is None or rate is None:
        return None
    return max(one.flops / rate, (one.bytes or 0) / measured["copy_bytes_per_second"]) / one.seconds


def ratios(others: dict[str, dict[str, float]]) -> str:
    return "; ".join(f"{name} {r['median']:.2f} [{r['low']:.2f}–{r['high']:.2f}]" for name, r in others.items())


def markdown(
    rows: Sequence[Row], described: dict[str, Any], failed: Sequence[str] = (), left_out: Sequence[str] = ()
) -> str:
    measured = described["peaks"]
    lines = [
        f"{described['card']}, fastlm {described['fastlm']}, PyTorch {described['torch']}, Triton {described['triton']}. "
        f"Copy {measured['copy_bytes_per_second'] / 1e9:,.0f} GB/s (read plus written); fastest product: "
        + ", ".join(
            f"{v / 1e12:,.0f} TFLOP/s in {k.split('_')[0]}"
            for k, v in measured.items()
            if k.endswith("flops_per_second")
        )
        + ". Ratios: median [quartiles] of pairs timed in turn, how many times as fast as the rival, or as another backend (torch: PyTorch's operators behind "
        "fastlm's functions). *: what `auto` takes.",
        "",
        "| operator | shape | dtype | direction | served by | time | TFLOP/s | of roof | times as fast as rivals | as other backends |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        part = share(one, measured)
        rate = "–" if one.flops is None else f"{one.flops / one.seconds / 1e12:.1f}"
        lines.append(
            f"| `{one.operator}` | {one.shape} | {one.dtype} | {one.direction} | {one.served_by}{'*' * one.auto} | {one.seconds * 1e6:,.1f} µs | {rate} | "
            f"{'–' if part is None else f'{part:.0%}'} | {ratios(one.rivals)} | {ratios(one.backends)} |"
        )
        if one.peak_bytes:
            taken_by_ours = one.peak_bytes[one.served_by]
            words = ", ".join(
                f"{name} {taken / 2**30:.2f} GiB ({taken_by_ours / max(taken, 1):.0%})"
                for name, taken in one.peak_bytes.items()
            )
            lines.append(f"| | most memory of the step, and this one's share of it | | | | | | | {words} | |")
    for title, what in (("Failed", failed), ("Left out, as time ran out", left_out)):
        if what:
            lines += ["", f"{title}:", "", *(f"- {line}" for line in what)]
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: Sequence[Row], described: dict[str, Any]) -> None:
    """How many times as fast as the best rival, and the share of the roof."""
    from matplotlib.figure import Figure

    rows = [one for one in rows if one.rivals]  # without any there is nothing to be drawn beside
    figure = Figure(figsize=(13, max(4, 1.5 + 0.3 * len(rows))), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    best = [min(one.rivals.values(), key=lambda r: r["seconds"]) for one in rows]
    left.barh(
        places,
        [r["median"] for r in best],
        xerr=[[r["median"] - r["low"] for r in best], [r["high"] - r["median"] for r in best]],
        color="#08519c",
    )
    left.axvline(1, color="#d94801")
    left.set_yticks(
        places,
        [f"{one.operator} {one.direction}, {one.dtype}, {one.served_by}\n{one.shape}" for one in rows],
        fontsize=7,
    )
    left.invert_yaxis()
    left.set(title="throughput", xlabel="times as fast as the best of PyTorch and flash-attn (line: equal)")
    right.barh(places, [100 * (share(one, described["peaks"]) or 0) for one in rows], color="#238b45")
    right.set(title="roofline", xlabel="% of what memory and matrix units allow")
    figure.suptitle(f"{described['card']}, fastlm {described['fastlm']}, PyTorch {described['torch']}", fontsize=11)
    figure.savefig(path)
