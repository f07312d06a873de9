"""Benchmark of attention: dense, decoding with a cache, and packed."""

import itertools

import torch
from torch import Tensor

from fastlm.ops.attention import baselines
from fastlm.ops.attention.api import attention
from fastlm.ops.attention.varlen import attention_varlen
from fastlm.ops.benchmark import HEADS, ROWS, WIDTH, Benchmark, Case, Problem, normal

HEAD_DIM = WIDTH // HEADS


def dense(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    batch: int = 1,
    heads: int = HEADS,
    tokens: int = ROWS,
    head_dim: int = HEAD_DIM,
    causal: bool = True,
    dropout_p: float = 0.0,
) -> Problem:
    """Query, key and value are views of one projection, and the upstream gradient is laid out as (B, T, H, D)."""

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
        return attention(q, k, v, causal=causal, dropout_p=dropout_p, backend=backend)

    projection = normal(batch, tokens, 3, heads, head_dim, dtype=dtype, device=device)
    flex = baselines.flex(baselines.causal_mask if causal else None, tokens, device)
    compiled = {"compiled": torch.compile(baselines.sdpa(causal, dropout_p), dynamic=False)}
    sequences = f"{batch} × " if batch > 1 else ""
    options = f"{', causal' if causal else ''}{f', dropout {dropout_p:g}' if dropout_p else ''}"
    return Problem(
        f"{heads} heads of {head_dim}, {sequences}{tokens} tokens{options}",
        ours,
        baselines.dense(device, dtype, causal, dropout_p),
        inputs=projection.permute(2, 0, 3, 1, 4).unbind(0),
        upstream=[normal(batch, tokens, heads, head_dim, dtype=dtype, device=device).transpose(1, 2)],
        compiled=compiled | ({"flex compiled": flex} if device == "cuda" else {}),
        flop_share=(tokens + 1) / (2 * tokens) if causal else 1.0,
        random=dropout_p > 0,
    )


def windowed(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    heads: int = HEADS,
    tokens: int = 4 * ROWS,
    head_dim: int = HEAD_DIM,
    window: int = ROWS // 2,
) -> Problem:
    """Causal, over the last `window` keys; PyTorch's kernel takes that as a mask."""

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
        return attention(q, k, v, causal=True, window=(window - 1, None), backend=backend)

    projection = normal(1, tokens, 3, heads, head_dim, dtype=dtype, device=device)
    outside = max(0, tokens - window)
    return Problem(
        f"{heads} heads of {head_dim}, {tokens} tokens, window {window}",
        ours,
        {"eager": baselines.masked(baselines.band(tokens, window, device))},
        inputs=projection.permute(2, 0, 3, 1, 4).unbind(0),
        upstream=[normal(1, tokens, heads, head_dim, dtype=dtype, device=device).transpose(1, 2)],
        flop_share=(tokens * (tokens + 1) - outside * (outside + 1)) / (2 * tokens**2),
    )


def decode(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    batch: int,
    heads: int = HEADS,
    tokens: int = ROWS,
    head_dim: int = HEAD_DIM,
) -> Problem:
    """One query per sequence, and the keys and values of a cache."""

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
        return attention(q, k, v, causal=True, backend=backend)

    lengths = (1, tokens, tokens)
    return Problem(
        f"{batch} × {heads} heads of {head_dim}, one query, {tokens} keys",
        ours,
        baselines.decode(device, dtype),
        inputs=[normal(batch, heads, length, head_dim, dtype=dtype, device=device) for length in lengths],
    )


def uneven(tokens: int) -> list[int]:
    """The lengths of eight sequences of `tokens` tokens in all. The longest has a quarter: padded, half is padding."""
    ends = [round(tokens * share / 32) for share in itertools.accumulate((8, 1, 2, 3, 4, 4, 4, 6))]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def packed(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    tokens: int = ROWS,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    repeats: int = 1,
    causal: bool = False,
) -> Problem:
    """`repeats` times eight sequences of `tokens` tokens in all, bidirectional as in BERT."""
    lengths = uneven(tokens) * repeats
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    total = sum(lengths)

    def ours(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Tensor:
        return attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=causal, backend=backend)

    squares = sum(length**2 for length in lengths)
    sequences = f"{len(lengths)} sequences of {min(lengths)}–{max(lengths)}"
    compiled = {"flex compiled": baselines.flex_packed(lengths, causal, device)} if device == "cuda" else None
    return Problem(
        f"{heads} heads of {head_dim}, {sequences}, {total} tokens{', causal' if causal else ''}",
        ours,
        baselines.packed(device, dtype, lengths, cu_seqlens, causal),
        inputs=normal(total, 3, heads, head_dim, dtype=dtype, device=device).unbind(1),
        upstream=[normal(total, heads, head_dim, dtype=dtype, device=device)],
        compiled=compiled,
        flop_share=(squares + total) / (2 * squares) if causal else 1.0,
    )


def on_gpu(
    batch: int, tokens: int, heads: int = HEADS, head_dim: int = HEAD_DIM, causal: bool = True, **options
) -> Case:
    sizes = {"batch": batch, "heads": heads, "tokens": tokens, "head_dim": head_dim, "causal": causal}
    return Case("attention", dense, sizes, **options)


def decode_on_gpu(batch: int, tokens: int = ROWS, **options) -> Case:
    sizes = {"batch": batch, "tokens": tokens}
    return Case("attention_decode", decode, sizes, directions=("forward",), **options)


def packed_on_gpu(**options) -> Case:
    return Case("attention_varlen", packed, {"tokens": 4096, "repeats": 4} | options.pop("sizes", {}), **options)


def variant(name: str, **sizes) -> Case:
    return Case(f"attention_{name}", dense, sizes, default=False)


FEW_QUERIES = 32  # up to here, as when decoding, reading keys and values is all that takes time
DENSE, PACKED = {"packed": (0, 0)}, {"packed": (1, 1)}

benchmark = Benchmark(
    cases=(
        Case("attention", dense),
        Case("attention_varlen", packed),
        variant("512_tokens", tokens=512, batch=2),
        variant("2048_tokens", tokens=2048),
        variant("dropout", tokens=512, batch=2, dropout_p=0.1),
        Case("attention_window", windowed, default=False),
        variant("small", tokens=2, heads=2, head_dim=8),
        Case("attention_varlen_small", packed, {"tokens": 32, "heads": 2, "head_dim": 8}, default=False),
    ),
    gpu_cases=(
        on_gpu(16, 1024, compiled=True, priority=0),
        on_gpu(4, 4096),
        on_gpu(8, 2048, 16, 128),
        decode_on_gpu(64),
        decode_on_gpu(1, compiled=True),
        decode_on_gpu(8),
        decode_on_gpu(8, 4096),
        on_gpu(16, 1024, dtypes=("float16",), priority=3),
        on_gpu(4, 1024, dtypes=("float32",), priority=3),
        decode_on_gpu(8, dtypes=("float32", "float16"), priority=3),
        packed_on_gpu(compiled=True, priority=3),
        packed_on_gpu(sizes={"causal": True}, priority=3),
        on_gpu(32, 512, causal=False, priority=4),
    ),
    table_cases=(
        *(Case("attention", dense, {"tokens": tokens}) for tokens in (32, ROWS)),
        *(Case("attention_varlen", packed, {"tokens": tokens}) for tokens in (32, ROWS)),
    ),
    axes=((DENSE, ("query_len",)), (PACKED, ("query_len",))),
    gpu_axes=(
        (DENSE | {"query_len": (None, FEW_QUERIES)}, ("batch", "key_len")),
        (DENSE | {"query_len": (FEW_QUERIES + 1, None)}, ("masked", "head_dim", "query_len")),
        (PACKED, ("masked", "query_len")),
    ),
)
