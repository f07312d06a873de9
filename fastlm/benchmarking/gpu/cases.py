"""Operators at the sizes that are measured on a GPU: ours by each backend, rivals, inputs, and the least work.

FLOPs are of multiplications and additions that cannot be left out; bytes of what must be read and written once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastlm
from fastlm.benchmarking.gpu import rivals
from fastlm.benchmarking.machine import Work
from fastlm.benchmarking.operators import EPSILON, of_linear, product, stored, uneven


@dataclasses.dataclass
class Case:
    operator: str
    shape: str
    dtype: torch.dtype
    features: dict[str, int]  # of table.FEATURES: what a call tells the choice of backends
    ours: Callable[..., Any]  # (*inputs, backend=…)
    rivals: dict[str, Callable[..., Any]]  # (*inputs)
    inputs: Sequence[Tensor]
    upstream: Sequence[Tensor]  # the gradients of the results
    forward: Work
    both: Work | None  # forward and backward; None: it is called without gradients only


def normal(device: str, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def pairs(tokens: int, causal: bool) -> int:
    """Of a query and a key that it sees."""
    return tokens * (tokens + 1) // 2 if causal else tokens**2


def attention(
    device: str,
    dtype: torch.dtype,
    compiled: bool,
    *,
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    causal: bool = True,
) -> Case:
    """q, k, v are views of one packed projection, and the gradient arrives token by token, as in a model."""
    packed = normal(device, dtype, batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    # Two products forward, five backward (the scores again). Forward reads q, k, v and writes the result; backward reads these and its gradient, writes three.
    flops, moved = (
        4 * batch * heads * head_dim * pairs(tokens, causal),
        batch * heads * tokens * head_dim * dtype.itemsize,
    )
    sizes = {"batch": batch, "heads": heads, "query_len": tokens, "key_len": tokens, "head_dim": head_dim}
    return Case(
        "attention",
        f"{batch} × {heads} heads of {head_dim}, {tokens} tokens{', causal' * causal}",
        dtype,
        {**sizes, "masked": causal, "dropout": False, "return_lse": False, "mask_gradient": False},
        functools.partial(fastlm.attention, causal=causal),
        rivals.attention(device, dtype, tokens, causal, compiled),
        list(packed.unbind(0)),
        [normal(device, dtype, batch, tokens, heads, head_dim).transpose(1, 2)],
        Work(flops, 4 * moved),
        Work(3.5 * flops, 12 * moved),
    )


def attention_decode(
    device: str, dtype: torch.dtype, compiled: bool, *, batch: int, heads: int, tokens: int, head_dim: int
) -> Case:
    """One query of each sequence, and the keys and values of a cache: (batch, heads, tokens, head_dim)."""
    query, key, value = (normal(device, dtype, batch, heads, length, head_dim) for length in (1, tokens, tokens))
    # Reads the keys and values once; query and result are next to nothing.
    flops, moved = 4 * batch * heads * head_dim * tokens, batch * heads * (2 * tokens + 2) * head_dim * dtype.itemsize
    sizes = {"batch": batch, "heads": heads, "query_len": 1, "key_len": tokens, "head_dim": head_dim}
    return Case(
        "attention",
        f"{batch} × {heads} heads of {head_dim}, one query, {tokens} keys",
        dtype,
        {**sizes, "masked": False, "dropout": False, "return_lse": False, "mask_gradient": False},
        functools.partial(fastlm.attention, causal=True),
        rivals.decode(device, dtype, compiled),
        [query, key, value],
        [],
        Work(flops, moved),
        None,
    )


def attention_varlen(
    device: str,
    dtype: torch.dtype,
    compiled: bool,
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    times: int = 1,
    causal: bool = False,
) -> Case:
    """`times` eight sequences of `tokens` tokens in all, of which the longest has a quarter. q, k, v are views of one packed projection."""
    lengths = uneven(tokens) * times
    ends = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    total, longest = ends[-1], max(lengths)
    places = torch.cat([torch.arange(length) + i * longest for i, length in enumerate(lengths)]).to(device)
    # As attention, over the square, or half of it, of each sequence.
    flops = 4 * heads * head_dim * sum(pairs(length, causal) for length in lengths)
    moved = total * heads * head_dim * dtype.itemsize
    sizes = {
        "sequences": len(lengths),
        "heads": heads,
        "query_tokens": total,
        "key_tokens": total,
        "head_dim": head_dim,
    }

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
        return fastlm.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=causal, backend=backend)

    return Case(
        "attention_varlen",
        f"{heads} heads of {head_dim}, {len(lengths)} sequences of {min(lengths)}–{longest}, {total} tokens{', causal' * causal}",
        dtype,
        {**sizes, "masked": causal, "dropout": False, "return_lse": False},
        ours,
        rivals.attention_varlen(device, dtype, lengths, cu_seqlens, places, causal, compiled),
        list(normal(device, dtype, total, 3, heads, head_dim).unbind(1)),
        [normal(device, dtype, total, heads, head_dim)],
        Work(flops, 4 * moved),
        Work(3.5 * flops, 12 * moved),
    )


def layernorm_residual(device: str, dtype: torch.dtype, compiled: bool, *, rows: int, width: int) -> Case:
    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        summed = residual + x
        return F.layer_norm(summed, (width,), weight, bias, EPSILON), summed

    def ours(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None
    ) -> tuple[Tensor, Tensor]:
        return fastlm.layernorm_residual(x, residual, weight, bias, EPSILON, backend=backend)

    # Forward reads x and the residual and writes both results, some 10 operations per element; backward reads the sum and two gradients, writes one, some 16.
    size = rows * width * dtype.itemsize
    wide = functools.partial(normal, device, dtype, rows, width)
    return Case(
        "layernorm_residual",
        f"{rows} × {width}",
        dtype,
        {"rows": rows, "width": width, "dropout": False},
        ours,
        rivals.eager_and_compiled(eager, compiled),
        [wide(), wide(), normal(device, dtype, width), normal(device, dtype, width)],
        [wide(), wide()],
        Work(10 * rows * width, 4 * size),
        Work(26 * rows * width, 8 * size),
    )


def gelu_mlp(device: str, dtype: torch.dtype, compiled: bool, *, rows: int, width: int, layout: str = "conv1d") -> Case:
    """conv1d: as in GPT-2, weights (in, out) and the tanh GELU; linear: as in BERT, weights (out, in) and the exact one."""
    hidden, approximate = 4 * width, "tanh" if layout == "conv1d" else "none"

    def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return product(F.gelu(product(x, w1, b1, layout), approximate=approximate), w2, b2, layout)

    # Two products, in backward two for each; forward reads x and both weights and writes the result.
    flops, moved = 4 * rows * width * hidden, (2 * rows * width + 2 * width * hidden) * dtype.itemsize
    vector, weight = functools.partial(normal, device, dtype), functools.partial(stored, dtype=dtype, layout=layout)
    return Case(
        "gelu_mlp",
        f"{rows} × {width} → {hidden} → {width}{of_linear(layout)}",
        dtype,
        {"rows": rows, "in_width": width, "hidden_width": hidden, "out_width": width, "conv1d": layout == "conv1d"},
        functools.partial(fastlm.gelu_mlp, approximate=approximate, layout=layout),
        rivals.eager_and_compiled(eager, compiled),
        [
            vector(rows, width),
            weight(width, hidden).to(device),
            vector(hidden),
            weight(hidden, width).to(device),
            vector(width),
        ],
        [vector(rows, width)],
        Work(flops, moved),
        Work(3 * flops, 3 * moved),
    )


def linear_cross_entropy(device: str, dtype: torch.dtype, compiled: bool, *, rows: int, width: int, vocab: int) -> Case:
    target = torch.randint(vocab, (rows,), device=device)

    def ours(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
        return fastlm.linear_cross_entropy(x, weight, target, backend=backend)

    # One product, in backward two; the logits need never reach memory.
    flops, moved = 2 * rows * width * vocab, (rows + vocab) * width * dtype.itemsize
    return Case(
        "linear_cross_entropy",
        f"{rows} × {width} → {vocab}",
        dtype,
        {"rows": rows, "width": width, "vocab": vocab},
        ours,
        rivals.eager_and_compiled(lambda x, weight: F.cross_entropy(F.linear(x, weight), target), compiled),
        [normal(device, dtype, rows, width), normal(device, dtype, vocab, width, scale=0.02)],
        [torch.ones((), device=device)],
        Work(flops, moved),
        Work(3 * flops, 3 * moved),
    )
