"""Benchmark of rotary."""

import torch
from torch import Tensor

from fastlm.ops.benchmark import HEADS, ROWS, Benchmark, Case, Problem, normal
from fastlm.ops.rotary.api import rotary


def eager_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def problem(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    rows: int = ROWS,
    heads: int = HEADS,
    num_kv_heads: int = HEADS // 3,
    head_dim: int = 64,
) -> Problem:
    """One sequence; queries and keys are views of projections."""
    angles = torch.arange(rows)[None, :, None] / 10000 ** (torch.arange(head_dim) % (head_dim // 2) * 2 / head_dim)
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    rounded = [t.to(dtype)[:, None] for t in (cos, sin)]

    def ours(query: Tensor, key: Tensor, backend: str | None = None):
        return rotary(query.transpose(1, 2), key.transpose(1, 2), cos, sin, backend=backend)

    def eager(query: Tensor, key: Tensor):
        return tuple(eager_rotation(x.transpose(1, 2), *rounded) for x in (query, key))

    return Problem(
        f"{rows} × ({heads} + {num_kv_heads}) × {head_dim}",
        ours,
        {"eager": eager},
        inputs=[normal(1, rows, n, head_dim, dtype=dtype, device=device) for n in (heads, num_kv_heads)],
        upstream=[normal(1, n, rows, head_dim, dtype=dtype, device=device) for n in (heads, num_kv_heads)],
    )


benchmark = Benchmark(
    cases=(
        Case("rotary", problem),
        Case("rotary_decode", problem, {"rows": 1}, default=False),
        Case("rotary_small", problem, {"rows": 2, "heads": 1, "num_kv_heads": 1, "head_dim": 16}, default=False),
    ),
    gpu_cases=(Case("rotary", problem, {"rows": 4096}), Case("rotary", problem, {"rows": 128})),
    table_cases=(Case("rotary", problem, {"rows": 16}), Case("rotary", problem)),
    axes=(({}, ("tokens",)),),
    gpu_axes=(({}, ("tokens",)),),
)
