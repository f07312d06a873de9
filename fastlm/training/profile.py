"""Where a training step spends its time: fastlm's kernels, PyTorch's operators, and the Python that calls them."""

import contextlib
import dataclasses
import os
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from fastlm.allocator import tune_allocator
from fastlm.backends import cpu
from fastlm.models.layers import RECOMPUTE
from fastlm.training.bench import Subject, fastlm_model, trainer_of

FASTLM, PYTORCH = "fastlm", "PyTorch"
STEP, MARK = "training step", "fastlm kernel "


@dataclasses.dataclass(frozen=True)
class Part:
    library: str  # FASTLM or PYTORCH
    name: str  # of a kernel or an operator
    calls: float  # per step
    seconds: float  # per step, without the operators that it calls


@dataclasses.dataclass(frozen=True)
class Profile:
    seconds: float  # of a step
    parts: list[Part]  # longest first

    @property
    def outside(self) -> float:
        """The share of a step spent in neither: Python, the autograd engine and, a little, the profiler itself."""
        return max(0.0, 1 - sum(part.seconds for part in self.parts) / self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "outside": self.outside}


def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        with record_function(MARK + name):
            return function(*arguments, **keywords)

    return call


@contextlib.contextmanager
def marked_kernels() -> Iterator[None]:
    """Makes fastlm's kernels visible to the profiler, which sees PyTorch's operators anyway."""
    functions = vars(cpu.kernels) if cpu.kernels else {}
    kernels = {name: function for name, function in functions.items() if callable(function) and name[0] != "_"}
    with contextlib.ExitStack() as stack:
        for name, function in kernels.items():
            stack.enter_context(unittest.mock.patch.object(cpu.kernels, name, marked(name, function)))
        yield


def profile_step(subject: Subject, dtype: str, *, recompute: int = RECOMPUTE, steps: int = 3) -> Profile:
    """`steps` training steps on the CPU, after one to warm up, with the tuned allocator."""
    tune_allocator()
    trainer = trainer_of(subject, *fastlm_model(subject, recompute), dtype)
    inputs, targets = subject.pairs()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints a line on stderr
    with marked_kernels():
        trainer.step(inputs, targets, 1e-4)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(steps):
                with record_function(STEP):
                    trainer.step(inputs, targets, 1e-4)
    averages = seen.key_averages()
    whole = next(event for event in averages if event.key == STEP)
    parts = [
        Part(
            FASTLM if ours else PYTORCH,
            event.key.removeprefix(MARK if ours else "aten::"),
            event.count / steps,
            event.self_cpu_time_total * 1e-6 / steps,
        )
        for event in averages
        if (ours := event.key.startswith(MARK)) or event.key.startswith("aten::")
    ]
    return Profile(whole.cpu_time_total * 1e-6 / steps, sorted(parts, key=lambda part: -part.seconds))
