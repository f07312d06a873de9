"""How an operator describes its benchmark: fastlm/ops/<operator>/bench.py has one `benchmark`.

fastlm.benchmarking runs it (`fastlm bench`, `fastlm bench --gpu`, `fastlm info --measure`, benchmarks/). FLOPs, bytes
and the selected backend of a case come from the calls that the operator makes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# GPT-2 small, one sequence of its context length.
ROWS, WIDTH, HEADS, VOCAB = 1024, 768, 12, 50257

DIRECTIONS = ("forward", "backward", "forward+backward")

Function = Callable[..., Any]
Range = tuple[int | None, int | None]  # both ends included; None is open
# The parts of an operator's calls for which rows of the selection table are derived, as ranges of sizes; and the sizes
# that distinguish the calls of a part, the most important first.
Axes = Sequence[tuple[Mapping[str, Range], tuple[str, ...]]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Operands in one dtype on one device, and the functions that are timed on them."""

    shape: str  # for tables: "1024 × 768"
    ours: Function  # (*inputs, backend=None)
    # (*inputs): other ways to compute the same. "eager", PyTorch's operators, is also the reference of the accuracy.
    baselines: Mapping[str, Function]
    inputs: Sequence[Tensor]  # those that get gradients
    upstream: Sequence[Tensor] = ()  # the gradients of the results
    compiled: Mapping[str, Function] | None = None  # baselines that compile at their first call; None: "eager" compiled
    flop_share: float = 1.0  # the share of the FLOPs that the spec counts which a mask leaves
    extra_bytes: int = 0  # memory traffic besides the operator's calls
    random: bool = False  # two calls give different results

    def compiled_baselines(self) -> Mapping[str, Function]:
        if self.compiled is None:
            return {"compiled": torch.compile(self.baselines["eager"], dynamic=False)}
        return self.compiled


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator at one size.

    Args:
        name: as `fastlm bench --operators` takes it.
        make: (dtype, device, **sizes) → Problem.
        sizes: passed to make.
        directions: of DIRECTIONS; or "step", a call of ours() without inputs.
        default: whether `fastlm bench` runs it unless told otherwise.
        dtypes: of a case for a GPU; on a CPU the user chooses.
        compiled: whether a GPU's case has the compiled baselines, which take seconds each.
        priority: of a case for a GPU, where time may run out: lower ones run first, 0 before everything else.
    """

    name: str
    make: Callable[..., Problem]
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    directions: tuple[str, ...] = DIRECTIONS
    default: bool = True
    dtypes: tuple[str, ...] = ("bfloat16",)
    compiled: bool = False
    priority: int = 1

    def problem(self, dtype: torch.dtype, device: str = "cpu", **sizes: Any) -> Problem:
        return self.make(dtype, device, **{**self.sizes, **sizes})

    def __str__(self) -> str:
        return ", ".join([self.name, *(f"{name} {size}" for name, size in self.sizes.items())])


@dataclasses.dataclass(frozen=True)
class Benchmark:
    cases: Sequence[Case]  # on a CPU
    gpu_cases: Sequence[Case] = ()
    # What `fastlm info --measure` compares fastlm's kernels with PyTorch's operators on, smaller sizes first, and the
    # axes of the rows that follow.
    table_cases: Sequence[Case] = ()
    axes: Axes = ()
    gpu_axes: Axes = ()


def normal(*shape: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1.0) -> Tensor:
    """The same numbers in every run."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
