"""What fastlm found on this machine: which backends serve, why the others do not, and how often a call fell back or copied."""

import dataclasses
import platform

import torch

from fastlm import allocator
from fastlm._version import __version__
from fastlm.backends import choice, cuda, isa, layout, table


@dataclasses.dataclass
class Info:
    """str() of it is the report that `fastlm info` prints."""

    version: str
    torch_version: str
    cpu: str  # the processor's own name for itself
    isa: str | None  # of the module in use
    isas: list[str]  # that this machine can run, the widest first
    bfloat16: str  # by what arithmetic the module multiplies it
    table: str  # which operators go to PyTorch's own on this CPU
    gpus: list[str]  # of each kind of GPU here, which backend comes first for what, or that it was not measured yet
    threads: int
    openmp: bool  # whether the extension was built with it
    backends: dict[str, list[str]]  # name → why it serves nothing here; empty = it can serve
    allocator: str  # whether memory that is freed stays with the process, and how it could
    build: str  # why there is no compiled module, or ""
    cuda: str  # what the CUDA module was built for and what it needs, or why there is none
    fallbacks: dict[str, int]  # "operator: taken instead of first" → calls
    copies: dict[str, int]  # layout that no stride describes → copies made

    def __str__(self) -> str:
        lines = [
            f"fastlm {self.version}, PyTorch {self.torch_version}",
            f"CPU: {self.cpu or 'unknown'}; can run {', '.join(self.isas) or 'no module that was built'}",
            f"compiled module: {self.isa}, {self.threads_in_words()}, bfloat16 by {self.bfloat16}"
            if self.isa
            else f"compiled module: none ({self.build})",
            *([f"table: {self.table}"] if self.isa else []),
            *(f"GPU: {line}" for line in self.gpus),
            f"CUDA module: {self.cuda}",
            f"allocator: {self.allocator}",
            "backends:",
            *(f"  {name:10} {'; '.join(why) or 'serves'}" for name, why in self.backends.items()),
        ]
        for title, counts in (("fallbacks", self.fallbacks), ("copies", self.copies)):
            lines.append(f"{title}: {'none' if not counts else ''}".rstrip())
            lines += [f"  {what}: {count}" for what, count in counts.items()]
        return "\n".join(lines)

    def threads_in_words(self) -> str:
        if not self.openmp:
            return "1 thread (built without OpenMP)"
        return f"{self.threads} thread{'s' if self.threads != 1 else ''}"


def info() -> Info:
    """What is built and usable here, why the rest is not, the ISA and threads in use, and how often a call fell back or copied a layout."""
    features = isa.features()
    return Info(
        version=__version__,
        torch_version=torch.__version__,
        cpu=features.brand() if features else platform.processor(),
        isa=isa.name,
        isas=isa.usable(),
        bfloat16=isa.BFLOAT16.get(isa.name or "", "multiply-adds in float32"),
        table=table.in_words(),
        gpus=table.gpus_in_words(),
        threads=torch.get_num_threads(),
        openmp=isa.report().get("openmp", False),
        backends={name: choice.unavailable(name) for name in choice.NAMES},
        allocator=allocator.in_words(),
        build=isa.missing,
        cuda=cuda.in_words(),
        fallbacks=dict(choice.fallbacks),
        copies=dict(layout.copies),
    )
