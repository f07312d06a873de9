"""The arguments of the commands that measure."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastlm.cli.app import Threads, app
from fastlm.commands import choices, options
from fastlm.core.errors import mismatch
from fastlm.models.layers import RECOMPUTE


@app.command()
def info(
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="First measure the machine's peaks and which backend is fastest for each operator and size, and use "
            "the results from now on. Takes minutes.",
        ),
    ] = False,
) -> None:
    """Show the available backends, why the others are not available, and the CPU and GPUs."""
    from fastlm.commands import info

    info.run(measure=measure)


@app.command()
def bench(
    ctx: typer.Context,
    operators: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated list of benchmarks: {choices.listed(choices.BENCHMARKS)}. "
            "growth: time by context and width; accelerated: transformers' models. "
            f"Default: {choices.listed(choices.DEFAULT_CASES)}.",
            show_default=False,  # the list would be cut off
        ),
    ] = ",".join(choices.DEFAULT_CASES),
    dtypes: Annotated[
        str, typer.Option(help="float32, bfloat16 (also fp32, bf16) or both, comma-separated.")
    ] = "float32,bfloat16",
    threads: Annotated[str, typer.Option(help="Comma-separated list of numbers of threads.")] = "1,2",
    directions: Annotated[
        str, typer.Option(help=f"Comma-separated list of {choices.listed(choices.DIRECTIONS)}.")
    ] = ",".join(choices.DIRECTIONS),
    model: Annotated[
        str, typer.Option(help=f"For training_step: comma-separated list of {choices.listed(choices.MODELS)}.")
    ] = "gpt2",
    recompute: Annotated[
        str, typer.Option(help="For training_step: comma-separated list of recomputation levels 0, 1, 2.")
    ] = str(RECOMPUTE),
    case: Annotated[
        str,
        typer.Option(
            help=f"For accelerated: comma-separated list of {choices.listed(choices.ACCELERATED)} "
            "(encoding of sentences, passages and documents; fine-tuning of the others). Default: all of them.",
            show_default=False,  # the list would be cut off
        ),
    ] = ",".join(choices.ACCELERATED),
    checkpoint: Annotated[Path | None, typer.Option(help="For encoding: directory of a MiniLM checkpoint.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also compare with torch.compile; needs a C++ compiler and takes minutes.")
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            help="Seconds per row, but at least five rounds; whole steps take 20 times as long, growth 5 times."
        ),
    ] = 3.0,
    json: Annotated[Path | None, typer.Option(help="Write all measurements to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables to this file.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot speedups, roofline, memory and growth to this file (.png, .svg, .pdf)."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Measure nothing: read the results from a file that --json wrote, and show or plot them."
        ),
    ] = None,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help="Measure the GPU instead, at other sizes; takes a few minutes. "
            "Accepts --json, --markdown, --plot, --table, --limit.",
        ),
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            help="With --gpu: write the table of the fastest backends to this file, in the format of `info --measure`, "
            "and with suffix .txt as Python source."
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            help="With --gpu: number of seconds after which no case is started. Important cases are measured first."
        ),
    ] = None,
) -> None:
    """Compare fastlm with PyTorch on this machine, at the sizes of GPT-2 small."""
    if gpu:
        from fastlm.commands import bench_gpu

        options.refuse_others(ctx, "--gpu", {"gpu", "json", "markdown", "plot", "table", "limit"})
        bench_gpu.run(bench_gpu.Files(json, markdown, plot, table), limit)
        return

    from fastlm.commands import bench

    for name, given in (("table", table), ("limit", limit)):
        if given is not None:
            raise mismatch(name, "this option together with --gpu", f"{given} without --gpu")

    files = bench.Files(json, markdown, plot)
    if source is not None:
        options.refuse_others(ctx, "--from, which measures nothing", {"source", "json", "markdown", "plot"})
        bench.show(source, files)
        return
    bench.run(
        command=shlex.join(["fastlm", *sys.argv[1:]]),
        operators=operators,
        dtypes=dtypes,
        threads=threads,
        directions_given=directions,
        models=model,
        recompute=recompute,
        accelerated_cases=case,
        checkpoint=checkpoint,
        compiled=compiled,
        seconds=seconds,
        files=files,
        given=options.given(ctx),
    )


@app.command()
def profile(
    model: Annotated[str, typer.Option(help=f"One of {choices.listed(choices.MODELS)}.")] = "gpt2",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (also fp32, bf16, fp16).")] = "float32",
    recompute: Annotated[int, typer.Option(help="Recomputation level 0, 1 or 2.")] = RECOMPUTE,
    steps: Annotated[int, typer.Option(help="Number of profiled training steps, after one warm-up step.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Write the whole profile to this file.")] = None,
    threads: Threads = None,
) -> None:
    """Profile a training step on the CPU: time in fastlm's kernels, in PyTorch's operators and in Python."""
    from fastlm.commands import profile

    profile.run(model=model, dtype=dtype, recompute=recompute, steps=steps, threads=threads, json_file=json)
