"""Rows as JSON and as Markdown."""

import importlib.util
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

import fastlm
from fastlm.benchmarking.compare import DTYPES, Baseline, Row
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


def percent(share: float | None, missing: str = "–") -> str:
    return missing if share is None else f"{share:.0%}"


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


def grid(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table of Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return [*lines, *(f"| {' | '.join(map(str, cells))} |" for cells in rows)]


def operator_table(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    directions, shares = ("forward", "backward", "forward + backward"), "share of peak, forward / backward"
    columns = ("operator", "dtype", "threads", *directions, shares, "memory", "error", "backend")
    return grid(columns, operator_cells(rows))


def operator_cells(rows: Sequence[Row]) -> Iterator[Sequence[object]]:
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
        yield f"`{operator}`", dtype, threads, *speedups, shares, relative_memory(whole), error, backends


def whole_table(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    names = list(dict.fromkeys(name for row in rows for name in row.baselines))
    variable = "size" if first.operator == "growth" else "recompute"
    speedups = [f"speedup over {name}" for name in names]
    columns = ("dtype", "threads", variable, "fastlm", "share of peak", *speedups, "memory", "relative to eager")

    def cells(row: Row) -> list[object]:
        assert row.tokens is not None
        varies = row.direction if variable == "size" else "–" if row.recompute is None else row.recompute
        ratios = [str(row.baselines[name].ratio) if name in row.baselines else "–" for name in names]
        megabytes = f"{row.bytes_held / 1e6:,.0f} MB" if row.bytes_held else "–"
        speed = f"{row.tokens / row.seconds:,.1f} tokens/s"
        return [row.dtype, row.threads, varies, speed, percent(row.share), *ratios, megabytes, relative_memory(row)]

    return ["", f"{first.operator.replace('_', ' ')}: {first.shape}", "", *grid(columns, map(cells, rows))]


def relative_memory(row: Row | None) -> str:
    eager = row and row.baselines.get("eager")
    return f"{row.bytes_held / eager.bytes:.2f}" if row and row.bytes_held and eager and eager.bytes else "–"


def speedup_over_best(row: Row) -> str:
    return f"{row.speedup}" + (f" ({row.best_baseline})" if row.best_baseline != "eager" else "")


def as_json(rows: Sequence[Row], described: dict[str, Any]) -> dict[str, Any]:
    return {"machine": described, "rows": [row.as_dict() for row in rows]}


# Of a GPU


def gpu(device: str, measured: dict[str, float]) -> dict[str, Any]:
    """The card, the versions, and the peaks that the shares refer to."""
    triton = __import__("triton").__version__ if importlib.util.find_spec("triton") else None
    card = torch.cuda.get_device_name() if device == "cuda" else device
    return {"card": card, "fastlm": fastlm.__version__, "torch": torch.__version__, "triton": triton, "peaks": measured}


def gpu_share(row: Row, measured: dict[str, float]) -> float | None:
    """The time that memory and matrix units need at least, over the time taken."""
    rate = measured.get(f"{row.dtype}_product_flops_per_second")
    if row.work is None or rate is None:
        return None
    return max(row.work.flops / rate, row.work.bytes / measured["copy_bytes_per_second"]) / row.seconds


def ratios(others: Mapping[str, Baseline]) -> str:
    return "; ".join(f"{name} {other.ratio}" for name, other in others.items())


def gpu_markdown(
    rows: Sequence[Row], described: dict[str, Any], failed: Sequence[str] = (), left_out: Sequence[str] = ()
) -> str:
    """A line for each backend of a case."""
    peaks = described["peaks"]
    rates = {name: rate for name, rate in peaks.items() if name.endswith("flops_per_second")}
    products = ", ".join(f"{rate / 1e12:,.0f} TFLOP/s in {name.split('_')[0]}" for name, rate in rates.items())
    measures = ("time", "TFLOP/s", "share of peak", "speedup over baselines", "speedup over other backends")

    def cells() -> Iterator[Sequence[object]]:
        for row in rows:
            rate = f"{row.work.flops / row.seconds / 1e12:.1f}" if row.work else "–"
            backend, time = f"{row.backend}{'*' if row.auto else ''}", f"{row.seconds * 1e6:,.1f} µs"
            share, others = percent(gpu_share(row, peaks)), (ratios(row.baselines), ratios(row.backends))
            yield f"`{row.operator}`", row.shape, row.dtype, row.direction, backend, time, rate, share, *others
            if own := row.bytes_held:
                takes = {name: other.bytes for name, other in (row.backends | row.baselines).items()}
                words = ", ".join(
                    f"{name} {taken / 2**30:.2f} GiB ({own / max(taken, 1):.0%})"
                    for name, taken in {row.backend: own, **takes}.items()
                    if taken is not None
                )
                yield "", "peak memory of the step (this row's, relative to it)", *[""] * 6, words, ""

    lines = [
        f"{described['card']}, fastlm {described['fastlm']}, PyTorch {described['torch']}, "
        f"Triton {described['triton']}. Copy {peaks['copy_bytes_per_second'] / 1e9:,.0f} GB/s (read plus written); "
        f"matrix product: {products}. Speedups: median [quartiles] of interleaved pairs; torch: PyTorch's operators "
        "behind fastlm's functions. *: selected automatically.",
        "",
        *grid(("operator", "shape", "dtype", "direction", "backend", *measures), cells()),
    ]
    for title, what in (("Failed", failed), ("Left out, as the time ran out", left_out)):
        if what:
            lines += ["", f"{title}:", "", *(f"- {line}" for line in what)]
    return "\n".join(lines) + "\n"
