"""Benchmark of linear_log_prob."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.ops.benchmark import ROWS, VOCAB, WIDTH, Benchmark, Case, Problem, normal
from fastlm.ops.linear_log_prob.api import linear_log_prob


def problem(
    dtype: torch.dtype, device: str = "cpu", *, rows: int = ROWS, width: int = WIDTH, vocab: int = VOCAB
) -> Problem:
    """Log-probabilities and entropies of GPT-2's output projection."""
    target = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(0)).to(device)

    def ours(x: Tensor, weight: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
        return linear_log_prob(x, weight, target, backend=backend)

    def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(F.linear(x, weight).float(), -1)
        return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    return Problem(
        f"{rows} × {width} → {vocab}",
        ours,
        {"eager": eager},
        inputs=[
            normal(rows, width, dtype=dtype, device=device),
            normal(vocab, width, dtype=dtype, device=device, scale=0.02),
        ],
        upstream=[normal(rows, dtype=torch.float32, device=device), normal(rows, dtype=torch.float32, device=device)],
    )


benchmark = Benchmark(
    cases=(
        Case("linear_log_prob", problem),
        Case("linear_log_prob_small", problem, {"rows": 2, "width": 16, "vocab": 16}, default=False),
    ),
    gpu_cases=(
        Case("linear_log_prob", problem, {"rows": 8192}, compiled=True, priority=3),
        Case("linear_log_prob", problem, {"rows": 1024}, priority=4),
        Case("linear_log_prob", problem, {"rows": 1024}, dtypes=("float32",), priority=5),
    ),
    table_cases=(Case("linear_log_prob", problem, {"rows": 32}), Case("linear_log_prob", problem)),
    axes=(({}, ("rows",)),),
    gpu_axes=(({}, ("rows",)),),
)
