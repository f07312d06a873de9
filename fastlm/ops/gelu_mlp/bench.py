"""Benchmark of gelu_mlp."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.ops.benchmark import ROWS, WIDTH, Benchmark, Case, Problem, normal
from fastlm.ops.gelu_mlp.api import gelu_mlp
from fastlm.ops.linear import bench as linear


def problem(
    dtype: torch.dtype, device: str = "cpu", *, rows: int = ROWS, width: int = WIDTH, layout: str = "conv1d"
) -> Problem:
    """conv1d: as in GPT-2, with the tanh GELU; linear: as in BERT, with the exact one. Nothing is recomputed."""
    hidden, approximate = 4 * width, "tanh" if layout == "conv1d" else "none"

    def ours(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, backend: str | None = None) -> Tensor:
        return gelu_mlp(x, w1, b1, w2, b2, approximate=approximate, layout=layout, recompute=0, backend=backend)

    def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        activated = F.gelu(linear.eager(x, w1, b1, layout), approximate=approximate)
        return linear.eager(activated, w2, b2, layout)

    return Problem(
        f"{rows} × {width} → {hidden} → {width}{linear.layout_in_words(layout)}",
        ours,
        {"eager": eager},
        inputs=[
            normal(rows, width, dtype=dtype, device=device),
            linear.random_weight(width, hidden, layout, dtype, device),
            normal(hidden, dtype=dtype, device=device),
            linear.random_weight(hidden, width, layout, dtype, device),
            normal(width, dtype=dtype, device=device),
        ],
        upstream=[normal(rows, width, dtype=dtype, device=device)],
    )


def on_gpu(rows: int, width: int = WIDTH, layout: str = "conv1d", **options) -> Case:
    return Case("gelu_mlp", problem, {"rows": rows, "width": width, "layout": layout}, **options)


benchmark = Benchmark(
    cases=(
        Case("gelu_mlp", problem),
        Case("gelu_mlp_bert", problem, {"layout": "linear"}, default=False),
        Case("gelu_mlp_small", problem, {"rows": 2, "width": 16}, default=False),
    ),
    gpu_cases=(
        on_gpu(16384, compiled=True, priority=2),
        on_gpu(4096, 1600, priority=4),
        on_gpu(4096, layout="linear", priority=4),
        on_gpu(4096, dtypes=("float32",), priority=5),
    ),
    table_cases=(Case("gelu_mlp", problem, {"rows": 32}), Case("gelu_mlp", problem)),
    axes=(({}, ("rows",)),),
    gpu_axes=(({}, ("conv1d", "rows")),),
)
