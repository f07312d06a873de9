"""fastlm bench: compares fastlm with PyTorch on this machine; prints tables and writes files."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import fastlm
from fastlm.benchmarking import accelerated, plots, report, saved, whole
from fastlm.benchmarking.compare import DTYPES, Row, compare
from fastlm.commands import bench_gpu, choices
from fastlm.commands.bench_screen import screen_tables
from fastlm.commands.display import console, say
from fastlm.commands.targets import check_target
from fastlm.core.errors import did_you_mean, mismatch
from fastlm.integrations.bench import check_checkpoint
from fastlm.models.bench import GENERATORS
from fastlm.ops.gelu_mlp.spec import RECOMPUTE_LEVELS
from fastlm.training.bench import MODELS, POINTS
from fastlm.training.settings import check_range, short_names


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the results are written; None: nowhere."""

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None

    def check(self) -> None:
        for field in dataclasses.fields(self):
            check_target(field.name, getattr(self, field.name))

    def write(self, rows: Sequence[Row], described: dict[str, Any]) -> None:
        if self.json:
            self.json.write_text(json.dumps(report.as_json(rows, described), indent=1) + "\n", encoding="utf-8")
        if self.markdown:
            self.markdown.write_text(report.markdown(rows, described), encoding="utf-8")
        if self.plot:
            plots.draw(self.plot, plots.figure_of(rows, described))


def show(source: Path, files: Files) -> None:
    """The tables and files of an earlier run, from its JSON file."""
    files.check()
    rows, described, ended = saved.read("from", source)
    if not rows:
        raise mismatch("from", "a file with at least one row", source)
    if "card" in described:
        show_gpu(rows, described, ended, files)
        return
    introduce(described)
    for table in screen_tables(rows):
        console.print(table)
    files.write(rows, described)


def show_gpu(rows: list[Row], described: dict[str, Any], ended: dict[str, list[str]], files: Files) -> None:
    text = report.gpu_markdown(rows, described, **ended)
    console.print(text, markup=False)
    if files.json:
        files.json.write_text(json.dumps(report.as_json(rows, described) | ended, indent=1) + "\n", encoding="utf-8")
    if files.markdown:
        files.markdown.write_text(text, encoding="utf-8")
    if files.plot:
        bench_gpu.draw(files.plot, rows, described)


def run(
    *,
    command: str,
    operators: str,
    dtypes: str,
    threads: str,
    directions_given: str,
    models: str,
    recompute: str,
    accelerated_cases: str,
    checkpoint: Path | None,
    compiled: bool,
    seconds: float,
    files: Files,
    given: Collection[str] = (),
) -> None:
    """given: the names of the arguments that the user has set."""
    chosen = parse_names("operators", operators, choices.BENCHMARKS)
    dtype_names = parse_names("dtypes", dtypes, tuple(DTYPES), short_names(DTYPES))
    chosen_directions = parse_names("directions", directions_given, choices.DIRECTIONS)
    chosen_models = parse_names("model", models, choices.MODELS)
    levels = [int(level) for level in parse_names("recompute", recompute, tuple(map(str, RECOMPUTE_LEVELS)))]
    cases = parse_names("case", accelerated_cases, choices.ACCELERATED)
    check_used(given, chosen, cases)
    if "accelerated" in chosen:
        check_checkpoint(cases, checkpoint)
    thread_counts = [parse_count("threads", n) for n in threads.split(",")]
    check_range("seconds", seconds, 0, 3600, open_left=True)
    files.check()

    described = {"command": command, **report.machine(thread_counts, dtype_names)}
    introduce(described)
    if torch.cuda.is_available():
        say("These are results of the CPU; fastlm bench --gpu measures the GPU.")
    if {*chosen} - {*choices.WHOLE_RUNS}:
        # Also for PyTorch: with the default settings the time of a call depends on which blocks were freed before it.
        say(str(fastlm.tune_allocator()))
    plan = [  # (benchmark, dtype, threads, direction or model or size, level of recomputation)
        (name, dtype, n, variant, level)
        for name in chosen
        for dtype in dtype_names
        for n in thread_counts
        for variant in variants_of(name, chosen_directions, chosen_models, cases)
        for level in (levels if name == "training_step" else [None])
    ]
    rows: list[Row] = []
    with (
        contextlib.suppress(KeyboardInterrupt),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed} of {task.total}"),
            TimeElapsedColumn(),
            console=console,
        ) as bar,
    ):
        task = bar.add_task("", total=len(plan))
        for name, dtype, n, variant, level in plan:
            bar.update(
                task, description=f"{' '.join(filter(None, (name, variant)))}, {dtype}, {n} thread{'s' * (n > 1)}"
            )
            rows.append(measure(name, dtype, n, variant, level, compiled, seconds, checkpoint))
            bar.advance(task)
    if not rows:
        raise KeyboardInterrupt
    say("speedup over PyTorch: median [quartiles] of interleaved runs; by: the backend")
    say("peak: percentage of the machine's measured peak; above 100 % if the data stay in the caches")
    if {*choices.WHOLE_RUNS} & {*chosen}:
        say("memory: use of a step beyond model and optimiser state, relative to the baseline's")
        say("level: of recomputation; tuned: PyTorch with fastlm.tune_allocator(), which fastlm always has here")
    for table in screen_tables(rows):
        console.print(table)
    files.write(rows, described)
    if len(rows) < len(plan):
        print(f"interrupted after {len(rows)} of {len(plan)} rows, which were kept", file=sys.stderr)
        raise typer.Exit(130)


def check_used(given: Collection[str], chosen: list[str], cases: list[str]) -> None:
    """An option that none of the chosen benchmarks reads is an error."""
    encoding = "accelerated" in chosen and "encoding" in cases
    needs = {  # option → (whether it is read, what reads it)
        "directions": (any(name in choices.CASES for name in chosen), "an operator among --operators"),
        "model": ("training_step" in chosen, "--operators training_step"),
        "recompute": ("training_step" in chosen, "--operators training_step"),
        "case": ("accelerated" in chosen, "--operators accelerated"),
        "checkpoint": (encoding, "--operators accelerated --case encoding"),
        "compile": (set(chosen) != {"generation"}, "another benchmark than generation"),
    }
    for name, (used, by) in needs.items():
        if not used and ("compiled" if name == "compile" else name) in given:
            raise mismatch(name, f"this option together with {by}", f"--operators {','.join(chosen)}")


def introduce(described: dict[str, Any]) -> None:
    say(f"{described['cpu']}, fastlm {described['fastlm']} ({described['isa']}), PyTorch {described['torch']}")
    for line in report.peaks_in_words(described):
        say(line)


def variants_of(name: str, chosen_directions: list[str], models: list[str], cases: list[str]) -> list[str]:
    """What to measure of a benchmark: directions of an operator, models of a training step, sizes that grow, …"""
    if case := choices.CASES.get(name):
        return [d for d in case.directions if d in chosen_directions or d not in choices.DIRECTIONS]
    others = {"training_step": models, "growth": [*POINTS], "accelerated": cases}
    return {**others, "generation": [*GENERATORS]}.get(name, [""])


def measure(
    name: str,
    dtype: str,
    n: int,
    variant: str,
    level: int | None,
    compiled: bool,
    seconds: float,
    checkpoint: Path | None,
) -> Row:
    if case := choices.CASES.get(name):
        return compare(case, dtype, n, variant, compiled=compiled, budget=seconds)
    if level is not None:
        return whole.compare_steps(
            dtype, n, subject=MODELS[variant], recompute=level, compiled=compiled, budget=20 * seconds
        )
    if name == "growth":
        return whole.compare_growth(variant, dtype, n, compiled=compiled, budget=5 * seconds)
    if name == "accelerated":
        return accelerated.compare_accelerated(
            variant, dtype, n, checkpoint=checkpoint, compiled=compiled, budget=20 * seconds
        )
    return whole.compare_generation(variant, dtype, n, budget=10 * seconds)


def parse_names(argument: str, text: str, allowed: tuple[str, ...], short: Mapping[str, str] = {}) -> list[str]:
    """short: other names of some of them."""
    given, also = (name.strip() for name in text.split(",")), f" (also {', '.join(short)})" if short else ""
    names = list(dict.fromkeys(short.get(name, name) for name in given))
    for name in names:
        if name not in allowed:
            expected = f"a comma-separated list of {choices.listed(allowed)}{also}"
            raise mismatch(argument, expected, f"{name!r}{did_you_mean(name, (*allowed, *short))}")
    return names


def parse_count(argument: str, text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 4096:
        raise mismatch(argument, "a comma-separated list of integers from 1 to 4096", repr(text))
    return int(text)
