"""Benchmark of rms_norm_residual."""

import torch
from torch import Tensor

from fastlm.ops.benchmark import HEADS, ROWS, WIDTH, Benchmark, Case, Problem, normal
from fastlm.ops.rms_norm_residual.api import rms_norm_residual

EPS = 1e-6


def llama(s: Tensor, weight: Tensor) -> Tensor:
    """As the modules of Llama compute it."""
    wide = s.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(s.dtype)


def problem(dtype: torch.dtype, device: str = "cpu", *, rows: int = ROWS, width: int = WIDTH) -> Problem:
    def ours(x: Tensor, residual: Tensor, weight: Tensor, backend: str | None = None):
        return rms_norm_residual(x, residual, weight, EPS, backend=backend)

    def eager(x: Tensor, residual: Tensor, weight: Tensor):
        summed = residual + x
        return llama(summed, weight), summed

    def matrix() -> Tensor:
        return normal(rows, width, dtype=dtype, device=device)

    return Problem(
        f"{rows} × {width}",
        ours,
        {"eager": eager},
        inputs=[matrix(), matrix(), normal(width, dtype=dtype, device=device)],
        upstream=[matrix(), matrix()],
    )


def heads(dtype: torch.dtype, device: str = "cpu", *, rows: int = ROWS, heads: int = HEADS, width: int = 64) -> Problem:
    """Queries over their head dimension, as a view of a projection."""

    def ours(x: Tensor, weight: Tensor, backend: str | None = None):
        return rms_norm_residual(x.transpose(1, 2), None, weight, EPS, backend=backend)[0]

    def eager(x: Tensor, weight: Tensor):
        return llama(x.transpose(1, 2), weight)

    return Problem(
        f"{rows} × {heads} × {width}",
        ours,
        {"eager": eager},
        inputs=[normal(1, rows, heads, width, dtype=dtype, device=device), normal(width, dtype=dtype, device=device)],
        upstream=[normal(1, heads, rows, width, dtype=dtype, device=device)],
    )


def on_gpu(rows: int, width: int = WIDTH, **options) -> Case:
    return Case("rms_norm_residual", problem, {"rows": rows, "width": width}, **options)


benchmark = Benchmark(
    cases=(
        Case("rms_norm_residual", problem),
        Case("rms_norm_heads", heads),
        Case("rms_norm_residual_16384_rows", problem, {"rows": 16384}, default=False),
        Case("rms_norm_residual_small", problem, {"rows": 2, "width": 16}, default=False),
    ),
    gpu_cases=(on_gpu(4096, compiled=True), *(on_gpu(*sizes) for sizes in ((8,), (128,), (16384, 1600), (65536, 256)))),
    table_cases=(Case("rms_norm_residual", problem, {"rows": 32}), Case("rms_norm_residual", problem)),
    axes=(({}, ("rows",)),),
    gpu_axes=(({}, ("rows", "width")),),  # of few rows the kernel launch decides, whatever the width
)
