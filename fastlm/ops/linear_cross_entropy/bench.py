"""Benchmark of linear_cross_entropy."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.ops.benchmark import ROWS, VOCAB, WIDTH, Benchmark, Case, Problem, normal
from fastlm.ops.linear_cross_entropy.api import linear_cross_entropy

# The gradients are computed in the forward pass, so there is no backward alone to compare.
DIRECTIONS = ("forward", "forward+backward")


def problem(
    dtype: torch.dtype, device: str = "cpu", *, rows: int = ROWS, width: int = WIDTH, vocab: int = VOCAB
) -> Problem:
    """The loss of GPT-2's output projection."""
    target = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(0)).to(device)

    def ours(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
        return linear_cross_entropy(x, weight, target, backend=backend)

    return Problem(
        f"{rows} × {width} → {vocab}",
        ours,
        {"eager": lambda x, weight: F.cross_entropy(F.linear(x, weight), target)},
        inputs=[
            normal(rows, width, dtype=dtype, device=device),
            normal(vocab, width, dtype=dtype, device=device, scale=0.02),
        ],
        upstream=[torch.ones((), device=device)],
    )


def case(name: str = "linear_cross_entropy", **options) -> Case:
    return Case(name, problem, directions=DIRECTIONS, **options)


benchmark = Benchmark(
    cases=(
        case(),
        case("linear_cross_entropy_small", sizes={"rows": 2, "width": 16, "vocab": 16}, default=False),
    ),
    gpu_cases=(
        case(sizes={"rows": 16384}, compiled=True, priority=2),
        case(sizes={"rows": 2048}, priority=4),
        case(sizes={"rows": 2048}, dtypes=("float32",), priority=5),
    ),
    table_cases=(case(sizes={"rows": 32}), case()),
    axes=(({}, ("rows",)),),
    gpu_axes=(({}, ("rows",)),),
)
