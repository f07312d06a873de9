"""Benchmark of linear."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlm.ops.benchmark import ROWS, VOCAB, WIDTH, Benchmark, Case, Problem, normal
from fastlm.ops.linear.api import linear


def random_weight(in_width: int, out_width: int, layout: str, dtype: torch.dtype, device: str) -> Tensor:
    shape = (in_width, out_width) if layout == "conv1d" else (out_width, in_width)
    return normal(*shape, dtype=dtype, device=device, scale=0.02)


def eager(x: Tensor, weight: Tensor, bias: Tensor, layout: str) -> Tensor:
    return torch.addmm(bias, x, weight) if layout == "conv1d" else F.linear(x, weight, bias)


def layout_in_words(layout: str) -> str:
    return ", nn.Linear layout" if layout == "linear" else ""


def problem(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    rows: int = ROWS,
    width: int = WIDTH,
    out: int = 3 * WIDTH,
    layout: str = "conv1d",
) -> Problem:
    """By default GPT-2's projection before attention."""
    return Problem(
        f"{rows} × {width} → {out}{layout_in_words(layout)}",
        lambda x, weight, bias, backend=None: linear(x, weight, bias, layout=layout, backend=backend),
        {"eager": lambda x, weight, bias: eager(x, weight, bias, layout)},
        inputs=[
            normal(rows, width, dtype=dtype, device=device),
            random_weight(width, out, layout, dtype, device),
            normal(out, dtype=dtype, device=device),
        ],
        upstream=[normal(rows, out, dtype=dtype, device=device)],
    )


def decode_step(dtype: torch.dtype, device: str = "cpu", *, rows: int, width: int = WIDTH, layers: int = 4) -> Problem:
    """The products of some layers of GPT-2 one after the other, as in a decode step of `rows` sequences.

    No weight is in the core's own cache when its turn comes.
    """
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * layers

    def every(product: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def call(x: Tensor, wide: Tensor, *weights: Tensor, **options) -> tuple[Tensor, ...]:
            return tuple(product(x if w.shape[0] == width else wide, w, **options) for w in weights)

        return call

    return Problem(
        f"{rows} × the {len(shapes)} weights of {layers} layers, {width} wide",
        every(lambda x, weight, backend=None: linear(x, weight, layout="conv1d", backend=backend)),
        {"eager": every(torch.mm)},
        inputs=[
            *(normal(rows, size, dtype=dtype, device=device) for size in (width, 4 * width)),
            *(random_weight(*shape, "conv1d", dtype, device) for shape in shapes),
        ],
        upstream=[normal(rows, out, dtype=dtype, device=device) for _, out in shapes],
    )


def variant(name: str, **sizes) -> Case:
    return Case(f"linear_{name}", problem, sizes, default=False)


benchmark = Benchmark(
    cases=(
        Case("linear", problem),
        variant("bert", layout="linear"),
        variant("up", out=4 * WIDTH),
        variant("down", width=4 * WIDTH, out=WIDTH),
        variant("vocabulary", out=VOCAB),
        variant("small", rows=2, width=16, out=16, layout="linear"),
        *(
            Case(f"linear_{rows}_row{'s' if rows > 1 else ''}", decode_step, {"rows": rows}, default=False)
            for rows in (1, 4, 16, 64)
        ),
    ),
    table_cases=(Case("linear", problem, {"rows": 32}), Case("linear", problem)),
    axes=(({}, ("rows",)),),
)
