"""Output of the commands: plain lines, and a progress bar with loss, tokens/s and remaining time."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fastlm.training.estimate import memory_in_use
from fastlm.training.report import Report, Step

console = Console(highlight=False)


def say(line: str = "") -> None:
    """Prints a line without interpreting markup or wrapping it."""
    console.print(line, markup=False, soft_wrap=True)


def quantity(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def describe_device(device: torch.device) -> str:
    """The device for the user: the name of the GPU, or the number of CPU threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return quantity(torch.get_num_threads(), "thread") if device.type == "cpu" else str(device)


WIDE = 100  # characters of a terminal in which the bar also shows the share of the peak and the memory


def has_room() -> bool:
    return console.is_terminal and console.width >= WIDE


@contextlib.contextmanager
def byte_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar that is shown as soon as there is progress, and removed at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield show


@contextlib.contextmanager
def progress_bar(
    total: float, name: str = "training", peak: float | None = None, device: torch.device | None = None
) -> Iterator["BarReport"]:
    """A bar with loss, tokens/s and time.

    Args:
        peak: tokens/s at the machine's peak of arithmetic.
        device: whose memory is shown in a wide terminal.
    """
    wide = [TextColumn("{task.fields[machine]}")] if has_room() and device is not None else []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[position]}"),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        *wide,
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as progress:
        yield BarReport(progress, total, name, peak, device)


class BarReport(Report):
    def __init__(
        self,
        progress: Progress,
        total: float,
        name: str,
        peak: float | None = None,
        device: torch.device | None = None,
    ):
        self.progress, self.name, self.peak, self.device = progress, name, peak, device
        self.task = progress.add_task(name, total=total, position="", loss="–", speed="–", machine="")

    def on_step(self, step: Step) -> None:
        self.show(step.step, f"step {step.step}", step.loss, f"{step.mean_tokens_per_second:,.0f}")
        if self.device is not None:
            share = "" if self.peak is None else f"{100 * step.mean_tokens_per_second / self.peak:.0f} % of peak, "
            memory = f"{memory_in_use(self.device) / 2**30:.1f} GiB"
            self.progress.update(self.task, machine=share + memory)
        if step.skipped:
            self.say(f"step {step.step}: skipped, as {step.skipped}")

    def show(self, completed: float, position: str, loss: float, speed: str) -> None:
        self.progress.update(self.task, completed=completed, position=position, loss=f"{loss:.3f}", speed=speed)

    def on_evaluation_start(self) -> None:
        self.progress.update(self.task, description="evaluating")

    def on_evaluation_end(self, step: int, train_loss: float, val_loss: float) -> None:
        self.progress.update(self.task, description=self.name)
        self.say(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")

    def on_sample(self, step: int, text: str) -> None:
        self.say(f"step {step}: sample {text!r}")

    def say(self, line: str) -> None:
        self.progress.console.print(line, markup=False, soft_wrap=True)
