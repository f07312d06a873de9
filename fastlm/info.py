"""What fastlm found on this machine: the backends, why some are not available, fallbacks and copies."""

import dataclasses
import platform

import torch

from fastlm import allocator
from fastlm._version import __version__
from fastlm.backends import cuda, isa, registry, selection, table
from fastlm.core import layout


@dataclasses.dataclass
class Info:
    """str() of it is the report that `fastlm info` prints."""

    version: str
    torch_version: str
    cpu: str  # the processor's own name
    isa: str | None  # of the compiled module in use
    isas: list[str]  # that this machine can run, the widest first
    bfloat16: str  # the arithmetic by which the module multiplies it
    forced: list[str]  # the backend and the module that are forced for every call, and by what
    table: str  # what backend selection prefers on this CPU; "" if a backend is forced
    gpus: list[str]  # the same for each GPU model here
    threads: int
    openmp: bool  # whether the module was built with it
    backends: dict[str, list[str]]  # name → why it is not available; empty = available
    operators: dict[str, list[str]]  # name → the backends that implement it
    allocator: str  # whether freed memory stays with the process, and how it could
    build: str  # why there is no compiled module, or ""
    cuda: str  # what the CUDA module was built for and what it needs, or why there is none
    fallbacks: dict[str, int]  # "operator: selected instead of first" → calls
    copies: dict[str, int]  # layout that no stride describes → copies made

    def __str__(self) -> str:
        if self.isa:
            module = f"{self.isa}, {self._threads()}, bfloat16 by {self.bfloat16}"
        else:
            module = f"none ({self.build})"
        lines = [
            f"fastlm {self.version}, PyTorch {self.torch_version}",
            f"CPU: {self.cpu or 'unknown'}; can run {', '.join(self.isas) or 'no module that was built'}",
            f"compiled module: {module}",
            *(f"forced: {line}" for line in self.forced),
            *([f"backend order: {self.table}"] if self.isa and self.table else []),
            *(f"GPU: {line}" for line in self.gpus),
            f"CUDA module: {self.cuda}",
            f"allocator: {self.allocator}",
            "backends:",
            *(f"  {name:10} {'; '.join(why) or 'available'}" for name, why in self.backends.items()),
            "operators:",
            *(f"  {name:20} {', '.join(backends)}" for name, backends in self.operators.items()),
        ]
        for title, counts in (("fallbacks", self.fallbacks), ("copies", self.copies)):
            lines.append(f"{title}: {'none' if not counts else ''}".rstrip())
            lines += [f"  {what}: {count}" for what, count in counts.items()]
        return "\n".join(lines)

    def _threads(self) -> str:
        if not self.openmp:
            return "1 thread (built without OpenMP)"
        return f"{self.threads} thread{'s' if self.threads != 1 else ''}"


def info() -> Info:
    """Which backends are available and why others are not, the ISA and threads in use, fallbacks and copies so far."""
    features = isa.features()
    operators, forced = registry.operators(), selection.forced_summary()
    return Info(
        version=__version__,
        torch_version=torch.__version__,
        cpu=features.brand() if features else platform.processor(),
        isa=isa.name,
        isas=isa.usable(),
        bfloat16=isa.BFLOAT16.get(isa.name or "", "multiply-adds in float32"),
        forced=[line for line in (forced, isa.forced_summary()) if line],
        table="" if forced else table.cpu_summary(),
        gpus=table.gpu_summaries(),
        threads=torch.get_num_threads(),
        openmp=isa.report().get("openmp", False),
        backends={name: registry.unavailable(name) for name in registry.BACKENDS},
        operators={
            name: [backend for backend in registry.BACKENDS if operator.implements(backend)]
            for name, operator in operators.items()
        },
        allocator=allocator.summary(),
        build=isa.missing,
        cuda=cuda.summary(),
        fallbacks=dict(selection.fallbacks),
        copies=dict(layout.copies),
    )
