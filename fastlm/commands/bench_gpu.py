"""fastlm bench --gpu: benchmarks of this GPU; prints a table and writes files.

The files are rewritten after every row, so that no result is lost when the time runs out.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import typer

from fastlm.backends import table_files
from fastlm.benchmarking import operators, plots, report, rules
from fastlm.benchmarking.compare import Row
from fastlm.benchmarking.gpu import plan
from fastlm.benchmarking.gpu.models import generation, training_step
from fastlm.benchmarking.gpu.timing import join, peaks
from fastlm.commands.display import console, say
from fastlm.commands.targets import check_target
from fastlm.core.errors import mismatch
from fastlm.training.settings import check_range


class Stopped(BaseException):
    """Raised by SIGTERM. Not an Exception, so that no compiler or library catches it."""


@contextlib.contextmanager
def stoppable(run: plan.Run) -> Iterator[None]:
    """SIGTERM, as `timeout` sends it, stops the measurements inside the block, but not the program."""

    def stop(number: int, frame: FrameType | None) -> None:
        run.stopped = True
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Stopped:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclasses.dataclass(frozen=True)
class Files:
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    table: Path | None = None  # in the format of the user's cache; also, with suffix .txt, as Python source

    def write(self, rows: list[Row], described: dict[str, Any], run: plan.Run) -> None:
        if self.json:
            ended = {"failed": run.failed, "left_out": run.left_out, "stopped": run.stopped}
            table_files.write(self.json, json.dumps(report.as_json(rows, described) | ended, indent=1) + "\n")
        if self.markdown:
            table_files.write(self.markdown, report.gpu_markdown(rows, described, run.failed, run.left_out))
        if self.table:
            card, found = described["card"], rules.rules_of(rows, operators.axes("cuda"), "cuda")
            measured_with = f"fastlm {described['fastlm']}, PyTorch {described['torch']}, Triton {described['triton']}"
            table_files.write(self.table, table_files.as_json({card: found}))
            table_files.write(self.table.with_suffix(".txt"), table_files.as_python(card, found, measured_with))


def draw(file: Path, rows: list[Row], described: dict[str, Any]) -> None:
    if any(row.baselines for row in rows):
        plots.draw(file, plots.figure_of_gpu(rows, described))
    else:
        say(f"no plot: no baseline was measured, so {file} was not written")


def run(files: Files, limit: float | None = None, device: str = "cuda") -> None:
    """limit: number of seconds after which no case is started."""
    if device == "cuda" and not torch.cuda.is_available():
        raise mismatch("gpu", "a GPU that PyTorch can use", "none (torch.cuda.is_available() is False)")
    for argument, file in dataclasses.asdict(files).items():
        check_target(argument, file)
    if limit is not None:
        check_range("limit", limit, 0, 86400, open_left=True)
    now = plan.Run(float("inf") if limit is None else limit)
    rows: list[Row] = []
    described = report.gpu(device, {})
    with stoppable(now):
        described["peaks"] = peaks(device, plan.DTYPES)
        step = now.attempt("training step", functools.partial(training_step, device))
        texts = (
            now.attempt(f"generation, batch {batch}", functools.partial(generation, device, batch)) for batch in (1, 8)
        )
        first, then = plan.planned()
        # Last, as compiling takes minutes.
        compiled = (
            now.measure(device, first, compiled=True),
            now.attempt("training step, compiled", functools.partial(training_step, device, compiled=True)),
            now.measure(device, then, compiled=True),
        )
        for found in itertools.chain(now.measure(device, first), step, *texts, now.measure(device, then), *compiled):
            join(found, rows)
            case = f"{found.operator} {found.shape}, {found.dtype}, {found.direction}, {found.backend}"
            say(f"{case}: {found.seconds * 1e6:,.1f} µs")
            files.write(rows, described, now)
    if described["peaks"]:
        files.write(rows, described, now)
        console.print(report.gpu_markdown(rows, described, now.failed, now.left_out), markup=False)
    if files.plot:
        draw(files.plot, rows, described)
    if now.stopped:
        print(f"stopped; the files contain the {len(rows)} rows measured so far", file=sys.stderr)
        raise typer.Exit(128 + signal.SIGTERM)
    if now.failed:
        print(f"error: {'; '.join(now.failed)}", file=sys.stderr)
        raise typer.Exit(1)
