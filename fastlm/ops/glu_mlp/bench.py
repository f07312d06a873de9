"""Benchmark of glu_mlp."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.ops.activation import ACTIVATIONS
from fastlm.ops.benchmark import Benchmark, Case, Problem, normal
from fastlm.ops.glu_mlp.api import glu_mlp
from fastlm.ops.linear import bench as linear

# SmolLM2-135M, two sequences of 512 tokens.
ROWS, WIDTH, HIDDEN = 1024, 576, 1536


def problem(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    rows: int = ROWS,
    width: int = WIDTH,
    hidden: int = HIDDEN,
    activation: str = "silu",
) -> Problem:
    """As in Llama. act(gate x) · up x is recomputed, which is the default."""

    def ours(x: Tensor, *weights: Tensor, backend: str | None = None) -> Tensor:
        return glu_mlp(x, *weights, activation=activation, backend=backend)

    def eager(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return F.linear(ACTIVATIONS[activation].value(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)

    name = "" if activation == "silu" else f", {activation}"
    return Problem(
        f"{rows} × {width} → {hidden} → {width}{name}",
        ours,
        {"eager": eager},
        inputs=[
            normal(rows, width, dtype=dtype, device=device),
            *(linear.random_weight(width, hidden, "linear", dtype, device) for _ in range(2)),
            linear.random_weight(hidden, width, "linear", dtype, device),
        ],
        upstream=[normal(rows, width, dtype=dtype, device=device)],
    )


def on_gpu(rows: int, width: int, hidden: int, **options) -> Case:
    return Case("glu_mlp", problem, {"rows": rows, "width": width, "hidden": hidden}, **options)


benchmark = Benchmark(
    cases=(
        Case("glu_mlp", problem),
        Case("glu_mlp_gemma", problem, {"activation": "gelu_tanh"}, default=False),
        Case("glu_mlp_decode", problem, {"rows": 1}, default=False, directions=("forward",)),
        Case("glu_mlp_small", problem, {"rows": 2, "width": 16, "hidden": 40}, default=False),
    ),
    gpu_cases=(
        on_gpu(16384, 576, 1536, compiled=True, priority=2),
        on_gpu(4096, 2048, 8192, priority=4),
        on_gpu(4096, 576, 1536, dtypes=("float32",), priority=5),
    ),
    table_cases=(Case("glu_mlp", problem, {"rows": 32}), Case("glu_mlp", problem)),
    axes=(({}, ("rows",)),),
    gpu_axes=(({}, ("rows",)),),
)
