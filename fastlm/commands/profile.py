"""fastlm profile: the time of a training step by kernel and operator."""

import json
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from fastlm.commands import choices
from fastlm.commands.display import console, quantity, say
from fastlm.commands.process import set_threads
from fastlm.commands.targets import check_target
from fastlm.ops.gelu_mlp.spec import RECOMPUTE_LEVELS
from fastlm.training.bench import MODELS
from fastlm.training.profile import FASTLM, PYTORCH, Profile, profile_step
from fastlm.training.settings import DTYPES, check_dtype, check_integer, check_one_of

MAX_ROWS = 10  # of PyTorch's operators, of which there are many short ones


def run(*, model: str, dtype: str, recompute: int, steps: int, threads: int | None, json_file: Path | None) -> None:
    check_one_of("model", model, choices.MODELS)
    dtype = check_dtype("dtype", dtype, DTYPES)
    check_one_of("recompute", recompute, RECOMPUTE_LEVELS)
    check_integer("steps", steps, 1)
    check_target("json", json_file)
    set_threads(threads)
    found = profile_step(MODELS[model], dtype, recompute=recompute, steps=steps)
    threads_used = quantity(torch.get_num_threads(), "thread")
    title = f"{MODELS[model]}, {dtype}, {threads_used}: {found.seconds * 1e3:,.1f} ms per step"
    console.print(table(found, title))
    kernels, operators = (
        sum(part.seconds for part in found.parts if part.library == library) / found.seconds
        for library in (FASTLM, PYTORCH)
    )
    say(f"fastlm's kernels {kernels:.1%}, PyTorch's operators {operators:.1%}, Python and autograd {found.outside:.1%}")
    if json_file:
        json_file.write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")


def table(found: Profile, title: str) -> Table:
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("library", "kernel or operator", "calls", "ms", "share"):
        shown.add_column(column, justify="left" if column in ("library", "kernel or operator") else "right")

    def row(library: str, name: str, calls: str, seconds: float) -> None:
        shown.add_row(library, name, calls, f"{seconds * 1e3:,.2f}", f"{seconds / found.seconds:.1%}")

    for library, most in ((FASTLM, None), (PYTORCH, MAX_ROWS)):
        parts = [part for part in found.parts if part.library == library]
        for part in parts[:most]:
            row(library, part.name, f"{part.calls:,.0f}", part.seconds)
        if rest := parts[len(parts[:most]) :]:
            row(
                library,
                f"{len(rest)} more",
                f"{sum(part.calls for part in rest):,.0f}",
                sum(part.seconds for part in rest),
            )
    row("", "Python and autograd", "", found.outside * found.seconds)
    return shown
