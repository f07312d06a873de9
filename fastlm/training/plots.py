"""Plots of the metrics of runs: loss, learning rate, gradient norm and throughput, several runs in each panel."""

import dataclasses
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastlm.core.errors import mismatch
from fastlm.models.config import read_json
from fastlm.training.curve import smoothed
from fastlm.training.metrics import FILE
from fastlm.training.run import RUN

FORMATS = (".png", ".svg", ".html")
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
svg { width: 100%; height: auto } table { border-collapse: collapse } caption { text-align: left; padding: 1em 0 0.3em }
th, td { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; text-align: right } th:first-child { text-align: left }"""


@dataclasses.dataclass
class Curves:
    """The metrics of a run. A value that is not finite is NaN, which is not drawn."""

    name: str
    steps: list[int]
    loss: list[float]
    lr: list[float]
    grad_norm: list[float]
    tokens_per_second: list[float]
    evaluations: list[tuple[int, float]]  # step, validation loss
    skipped: int
    settings: dict[str, Any]

    @classmethod
    def read(cls, run: Path) -> "Curves":
        """Raises ValueError if the directory has no metrics of a run."""
        path = run / FILE
        if not path.is_file():
            raise mismatch("run", f"the directory of a run, with {FILE}", repr(str(run)))
        records = []
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n"):  # a run that goes on may be writing the last line
                try:
                    records.append(json.loads(line))
                except ValueError:
                    got = repr(line[:60].decode(errors="replace"))
                    raise mismatch("run", f"JSON in line {number} of {path}", got) from None
        steps = [record for record in records if "loss" in record]
        evaluations = [(r["step"], number_of(r["val_loss"])) for r in records if "val_loss" in r]
        if not steps:
            raise mismatch("run", f"at least one step in {path}", "none")

        def column(name: str) -> list[float]:
            return [number_of(record[name]) for record in steps]

        settings = read_json(run / RUN).get("settings", {}) if (run / RUN).is_file() else {}
        return cls(
            str(run),
            [record["step"] for record in steps],
            column("loss"),
            column("lr"),
            column("grad_norm"),
            column("tokens_per_second"),
            evaluations,
            sum("skipped" in record for record in steps),
            settings,
        )


def number_of(value: float | None) -> float:
    return math.nan if value is None else value


def write(path: Path, runs: Sequence[Curves]) -> None:
    """Writes a PNG, an SVG, or an HTML page with the plots and tables of the results and settings.

    Raises:
        ValueError: the name has another ending, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise mismatch("out", f"a file that ends with {', '.join(FORMATS)}", repr(str(path)))
    figure = draw(runs)
    if path.suffix.lower() == ".html":
        path.write_text(page(runs, svg_of(figure)), encoding="utf-8")
    else:
        figure.savefig(path, format=path.suffix[1:].lower())


def draw(runs: Sequence[Curves]) -> Any:
    """A matplotlib figure with four panels."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        raise mismatch("out", 'an installation with matplotlib (pip install "fastlm[plot]")', "one without") from None
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 8), dpi=120, layout="constrained")
    panels: tuple[tuple[str, Callable[[Curves], list[float]], str], ...] = (
        ("loss (nats per token)", lambda run: run.loss, "linear"),
        ("learning rate", lambda run: run.lr, "linear"),
        ("gradient norm", lambda run: run.grad_norm, "log"),
        ("tokens per second", lambda run: run.tokens_per_second, "linear"),
    )
    for axes, (label, values_of, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for number, run in enumerate(runs):
            color, values = f"C{number % 10}", values_of(run)
            if label == "learning rate":
                axes.plot(run.steps, values, color=color, label=run.name)
                continue
            axes.plot(run.steps, values, color=color, alpha=0.25, linewidth=0.8)
            steps, finite = drawn(run.steps, values)
            axes.plot(steps, smoothed(finite), color=color, linewidth=1.6, label=run.name)
            if label.startswith("loss") and run.evaluations:
                axes.plot(*zip(*run.evaluations, strict=True), color=color, marker="o", markersize=4, linestyle=":")
        axes.set(xlabel="step", ylabel=label, yscale=scale)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    if any(run.evaluations for run in runs):
        first.plot([], [], color="#666666", marker="o", markersize=4, linestyle=":", label="validation")
    first.legend(frameon=False)
    return figure


def drawn(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """The finite values and their steps."""
    finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def svg_of(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def page(runs: Sequence[Curves], svg: str) -> str:
    rows = [["run", "steps", "last validation loss", "lowest", "at step", "tokens/s (median)", "skipped steps"]]
    for run in runs:
        best = min(run.evaluations, key=lambda e: (math.isnan(e[1]), e[1]), default=None)
        speeds = sorted(run.tokens_per_second)
        last = f"{run.evaluations[-1][1]:.4f}" if run.evaluations else "–"
        lowest = ("–", "–") if best is None else (f"{best[1]:.4f}", f"{best[0]:,}")
        rows.append(
            [run.name, f"{run.steps[-1]:,}", last, *lowest, f"{speeds[len(speeds) // 2]:,.0f}", str(run.skipped)]
        )
    names = [name for name in runs[0].settings if len({repr(run.settings.get(name)) for run in runs}) > 1]
    tables = table("Results", rows)
    if names:
        values = [[run.name, *(str(run.settings.get(name, "–")) for name in names)] for run in runs]
        tables += table("Settings that differ", [["run", *names], *values])
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Training runs</title>\n'
        f"<style>{STYLE}</style>\n{svg}\n{tables}</html>\n"
    )


def table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        kinds = ["td" if number and i else "th" for i in range(len(row))]
        cells = [f"<{kind}>{html.escape(x)}</{kind}>" for kind, x in zip(kinds, row, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return f"<table>\n<caption>{html.escape(caption)}</caption>\n{''.join(lines)}</table>\n"
