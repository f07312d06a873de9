"""fastlm bench: ours against PyTorch on this machine, as a table and as files."""

import dataclasses
import json
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import fastlm
from fastlm.benchmarking import accelerated, growth, plots, report, whole
from fastlm.benchmarking.compare import DTYPES, Row, compare
from fastlm.benchmarking.operators import CASES, DIRECTIONS, OTHERS, directions
from fastlm.benchmarking.optimizer import compare_adamw
from fastlm.commands.display import console, say
from fastlm.ops.boundary import mismatch
from fastlm.ops.gelu_mlp import LEVELS
from fastlm.training.settings import within

ACTORS = ("training_step", "growth", "accelerated")  # measured in processes of their own, PyTorch as it comes and tuned
NAMES = (*CASES, *OTHERS, "adamw", "generation", *ACTORS)


def run(
    *,
    operators: str,
    dtypes: str,
    threads: str,
    ways: str,
    models: str,
    recompute: str,
    accelerated_cases: str,
    checkpoint: Path | None,
    compiled: bool,
    seconds: float,
    json_file: Path | None,
    markdown_file: Path | None,
    plot_file: Path | None,
) -> None:
    chosen = several("operators", operators, NAMES)
    kinds = several("dtypes", dtypes, tuple(DTYPES))
    wanted = several("directions", ways, DIRECTIONS)
    subjects = several("model", models, tuple(whole.MODELS))
    levels = [int(level) for level in several("recompute", recompute, tuple(map(str, LEVELS)))]
    cases = several("case", accelerated_cases, accelerated.CASES)
    if "accelerated" in chosen:
        accelerated.check_checkpoint(cases, checkpoint)
    numbers = [number("threads", n) for n in threads.split(",")]
    within("seconds", seconds, 0, 3600, open_left=True)
    for argument, file in (("json", json_file), ("markdown", markdown_file), ("plot", plot_file)):
        check_target(argument, file)

    described = report.machine(numbers, kinds)
    say(f"{described['cpu']}, fastlm {described['fastlm']} ({described['isa']}), PyTorch {described['torch']}")
    for line in report.peaks_in_words(described):
        say(line)
    if torch.cuda.is_available():
        say("This is the CPU; fastlm bench --gpu measures the GPU.")
    if {*chosen} - {*ACTORS}:
        say(
            str(fastlm.tune_allocator())
        )  # for both libraries: as it comes, what a call takes depends on what was freed before it
    plan = [
        (name, dtype, n, way, level)
        for name in chosen
        for dtype in kinds
        for n in numbers
        for way in ways_of(name, wanted, subjects, cases)
        for level in (levels if name == "training_step" else [None])
    ]
    rows: list[Row] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total}"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("", total=len(plan))
        for name, dtype, n, way, level in plan:
            bar.update(task, description=f"{' '.join(filter(None, (name, way)))}, {dtype}, {n} thread{'s' * (n > 1)}")
            rows.append(measured(name, dtype, n, way, level, compiled, seconds, checkpoint))
            bar.advance(task)
    say(
        "times as fast as PyTorch: median [quartiles]; peak: share of what the machine can do, timed in turn too, above 100 % in its caches; by: whose kernels"
    )
    if {*ACTORS} & {*chosen}:
        say("memory: what the step takes beyond the model and the optimiser's state, over the rival's")
        say("level: of the model's recomputation; tuned: with fastlm.tune_allocator(), as fastlm itself")
    for table in report.screen_tables(rows):
        console.print(table)
    if json_file:
        json_file.write_text(json.dumps(report.as_json(rows, described), indent=1) + "\n", encoding="utf-8")
    if markdown_file:
        markdown_file.write_text(report.markdown(rows, described), encoding="utf-8")
    if plot_file:
        plots.draw(plot_file, rows, described)


def ways_of(name: str, wanted: list[str], subjects: list[str], cases: list[str]) -> list[str]:
    """What there is to measure of it: directions of an operator, models of a whole step, sizes that grow; an optimiser and a generation go one way."""
    if name in CASES or name in OTHERS:
        return [d for d in directions(name) if d in wanted]
    return {"training_step": subjects, "growth": [*growth.POINTS], "accelerated": cases}.get(name, [""])


def measured(
    name: str, dtype: str, n: int, way: str, level: int | None, compiled: bool, seconds: float, checkpoint: Path | None
) -> Row:
    if make := (CASES | OTHERS).get(name):
        return compare(
            dataclasses.replace(make(DTYPES[dtype]), operator=name), n, way, compiled=compiled, budget=seconds
        )
    if name == "adamw":
        return compare_adamw(dtype, n, budget=seconds)
    if level is not None:
        return whole.compare_steps(
            dtype, n, subject=whole.MODELS[way], recompute=level, compiled=compiled, budget=20 * seconds
        )
    if name == "growth":
        return growth.compare_growth(way, dtype, n, compiled=compiled, budget=5 * seconds)
    if name == "accelerated":
        return accelerated.compare_accelerated(
            way, dtype, n, checkpoint=checkpoint, compiled=compiled, budget=20 * seconds
        )
    return whole.compare_generation(dtype, n, budget=10 * seconds)


def several(argument: str, given: str, allowed: tuple[str, ...]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in names:
        if name not in allowed:
            raise mismatch(argument, f"some of {', '.join(allowed)}, with commas between", repr(name))
    return names


def number(argument: str, given: str) -> int:
    if not given.strip().isdecimal() or not 1 <= int(given) <= 4096:
        raise mismatch(argument, "whole numbers of at least 1, with commas between", repr(given))
    return int(given)


def check_target(argument: str, file: Path | None) -> None:
    """Before minutes are spent on measuring."""
    if file is None:
        return
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise mismatch(argument, "a file name in a folder that exists", repr(str(file)))
    if argument == "plot":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise mismatch(
                "plot", "matplotlib to be installed (pip install 'fastlm[plot]')", "an installation without it"
            ) from None
