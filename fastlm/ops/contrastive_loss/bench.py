"""Benchmark of contrastive_loss."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.ops.benchmark import Benchmark, Case, Problem, normal
from fastlm.ops.contrastive_loss.api import contrastive_loss

# The gradients are computed in the forward pass, so there is no backward alone to compare.
DIRECTIONS = ("forward", "forward+backward")


def problem(dtype: torch.dtype, device: str = "cpu", *, batch: int = 1024, width: int = 384) -> Problem:
    """A batch of embeddings of MiniLM's width, each with its document."""

    def eager(queries: Tensor, documents: Tensor) -> Tensor:
        similarity = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).t()
        return F.cross_entropy(similarity.float() / 0.05, torch.arange(batch, device=device))

    queries, documents = normal(2, batch, width, dtype=dtype, device=device)
    return Problem(
        f"{batch} × {width}",
        contrastive_loss,
        {"eager": eager},
        inputs=[queries, documents],
        upstream=[torch.ones((), device=device)],
    )


def case(name: str = "contrastive_loss", **options) -> Case:
    return Case(name, problem, directions=DIRECTIONS, **options)


benchmark = Benchmark(
    cases=(
        case(),
        case("contrastive_loss_small", sizes={"batch": 2, "width": 16}, default=False),
        case("contrastive_loss_large", sizes={"batch": 4096}, default=False),
    ),
    gpu_cases=(
        case(sizes={"batch": 8192}, compiled=True, priority=4),
        case(sizes={"batch": 8192}, dtypes=("float32",), priority=5),
    ),
    table_cases=(case(sizes={"batch": 64}), case()),
    axes=(({}, ("rows",)),),
    gpu_axes=(({}, ("rows",)),),
)
