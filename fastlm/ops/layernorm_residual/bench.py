"""Benchmark of layernorm_residual."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.ops.benchmark import ROWS, WIDTH, Benchmark, Case, Problem, normal
from fastlm.ops.layernorm_residual.api import layernorm_residual

EPS = 1e-5


def problem(dtype: torch.dtype, device: str = "cpu", *, rows: int = ROWS, width: int = WIDTH) -> Problem:
    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None):
        return layernorm_residual(x, residual, weight, bias, EPS, backend=backend)

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor):
        summed = residual + x
        return F.layer_norm(summed, (width,), weight, bias, EPS), summed

    def matrix() -> Tensor:
        return normal(rows, width, dtype=dtype, device=device)

    vector = normal(width, dtype=dtype, device=device)
    return Problem(
        f"{rows} × {width}",
        ours,
        {"eager": eager},
        inputs=[matrix(), matrix(), vector, vector.clone()],
        upstream=[matrix(), matrix()],
    )


def on_gpu(rows: int, width: int = WIDTH, **options) -> Case:
    return Case("layernorm_residual", problem, {"rows": rows, "width": width}, **options)


benchmark = Benchmark(
    cases=(
        Case("layernorm_residual", problem),
        Case("layernorm_residual_16384_rows", problem, {"rows": 16384}, default=False),
        Case("layernorm_residual_small", problem, {"rows": 2, "width": 16}, default=False),
    ),
    gpu_cases=(
        on_gpu(4096, compiled=True, priority=0),
        on_gpu(8, compiled=True),
        *(on_gpu(*sizes) for sizes in ((128,), (1024,), (16384,), (16384, 1600), (65536, 256))),
        *(on_gpu(rows, dtypes=("float32", "float16"), priority=3) for rows in (4096, 128)),
    ),
    table_cases=(Case("layernorm_residual", problem, {"rows": 32}), Case("layernorm_residual", problem)),
    axes=(({}, ("rows",)),),
    gpu_axes=(({}, ("rows", "width")),),  # of few rows the kernel launch decides, whatever the width
)
