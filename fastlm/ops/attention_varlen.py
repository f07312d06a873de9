"""Attention within each of several sequences of different lengths that are packed one after another, without padding between them."""

import itertools
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from fastlm import backends
from fastlm.backends import reference
from fastlm.ops.attention import UNLIMITED, band, differentiable_gradients, finite_scale
from fastlm.ops.boundary import (
    autocasts,
    check_like,
    check_probability,
    distinct,
    draw_seed,
    lowered,
    mismatch,
    opaque,
    present,
)

# 1. The function people call


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = ...,
    window: tuple[int | None, int | None] | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = ...,
    window: tuple[int | None, int | None] | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastlm.attention` within each sequence of a packed batch: a padded batch's results, and its dropout, without the padding.

    Sequence b has the queries cu_seqlens_q[b] … cu_seqlens_q[b + 1] − 1 and the keys cu_seqlens_k[b] … cu_seqlens_k[b + 1] − 1, and sees no other's.
    Either may be none: queries without keys get 0. causal and window are aligned bottom-right in each sequence, as in `fastlm.attention`.
    For sequences of 3, 1 and 4 tokens that attend to themselves both are tensor([0, 3, 4, 8]).

    Args:
        query: (total_q, heads, head_dim), floating point, any strides, as views of one packed projection. Under autocast query, key and value are
            cast to its dtype.
        key, value: (total_k, key_heads, head_dim), dtype and device of query; heads is a multiple of key_heads (grouped queries).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32 or int64, on query's device: 0, then where each sequence ends. On a GPU the kernels of triton and cuda
            read them there, and what does not fit is a device assert; only torch and reference, where they serve, read them back and wait for the GPU.
        causal: a query sees no key after it.
        window: (left, right): how many keys before and after its own position a query sees, its own always; None on a side = unlimited.
        scale: of the scores; None = 1 / √head_dim.
        dropout_p: probability of zeroing an attention weight, in [0, 1); active exactly when > 0 (a module passes 0 in eval).
        return_lse: also return the log-sum-exp of the scaled and masked scores.
        backend: force one backend by name; None takes the first that can (see fastlm.info()).

    Returns:
        (total_q, heads, head_dim) in query's dtype, contiguous; with return_lse also (heads, total_q) in float32 (float64 for float64).
        A query that sees nothing gets 0, with lse −inf.

    Raises:
        ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, can serve this call; the message lists why.
    """
    if autocasts(query):
        query, key, value = lowered(query, key, value)
    check(query, key, value, cu_seqlens_q, cu_seqlens_k)
    check_probability("dropout_p", dropout_p)
    scale = finite_scale(scale, query.shape[2])
    lower, upper = band(causal, window, 0)  # every sequence moves it to its own last key
    if opaque(query, key, value, cu_seqlens_q, cu_seqlens_k):
        backend = backends.requested(backend)
    else:  # once: the backward uses the same
        backend = serving(query, key, cu_seqlens_q, lower, upper, dropout_p > 0, return_lse, backend)
    seed = draw_seed(query) if dropout_p > 0 else None
    tensors, settings = (query, key, value, cu_seqlens_q, cu_seqlens_k), (scale, lower, upper, dropout_p, return_lse)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out, lse = AttentionVarlen.apply(*distinct(*tensors), seed, *settings, backend)
    else:
        out, lse = attention_varlen_forward(*tensors, seed, *settings, backend)
    return (out, lse) if return_lse else out


def check(query, key, value, cu_seqlens_q, cu_seqlens_k):
    """Everything but the values of cu_seqlens, which the backends check where they read them."""
    if query.dim() != 3 or query.shape[2] == 0 or query.shape[1] == 0:
        raise mismatch(
            "query", "shape (total_q, heads, head_dim), at least one head and head_dim 1 or more", tuple(query.shape)
        )
    if not query.dtype.is_floating_point:
        raise mismatch("query", "a floating-point tensor", query.dtype)
    _, heads, head_dim = query.shape
    if key.dim() != 3 or key.shape[2] != head_dim:
        raise mismatch("key", f"shape (total_k, key_heads, {head_dim}), as query", tuple(key.shape))
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise mismatch("key", f"a number of heads that divides query's {heads}", key.shape[1])
    if value.shape != key.shape:
        raise mismatch("value", f"shape {tuple(key.shape)}, as key", tuple(value.shape))
    check_like("key", key, query, "query")
    check_like("value", value, query, "query")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise mismatch(name, "shape (batch + 1,), 0 and where each sequence ends", tuple(cu_seqlens.shape))
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != query.device:
            raise mismatch(
                name, f"torch.int32 or torch.int64 on {query.device}", f"{cu_seqlens.dtype} on {cu_seqlens.device}"
            )
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise mismatch("cu_seqlens_k", f"shape {tuple(cu_seqlens_q.shape)}, as cu_seqlens_q", tuple(cu_seqlens_k.shape))


def serving(query, key, cu_seqlens_q, lower, upper, dropout, return_lse, backend):
    query_tokens, heads, head_dim = query.shape
    masked = lower > -UNLIMITED or upper < UNLIMITED
    return backends.choose(
        "attention_varlen",
        query,
        query.dtype,
        backend,
        cu_seqlens_q.shape[0] - 1,
        heads,
        query_tokens,
        key.shape[0],
        head_dim,
        masked,
        dropout,
        return_lse,
    )


# 2. Autograd


class AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p, return_lse, backend
    ):
        ctx.set_materialize_grads(False)
        settings = scale, lower, upper, dropout_p, return_lse
        out, lse = attention_varlen_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, *settings, backend)
        ctx.save_for_backward(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, out, lse)
        ctx.settings, ctx.backend = settings, backend
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        query, key, value, cu_seqlens_q, cu_seqlens_k, seed, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if dout is None and dlse is None:
            gradients = (None,) * 3
        elif torch.is_grad_enabled():  # create_graph=True: gradients that can themselves be differentiated
            formula = lambda q, k, v: reference.attention_varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, seed, *ctx.settings[:4]
            )  # noqa: E731
            gradients = differentiable_gradients(formula, (query, key, value), needed, dout, dlse)
        else:
            gradients = attention_varlen_backward(
                dout,
                dlse,
                query,
                key,
                value,
                cu_seqlens_q,
                cu_seqlens_k,
                seed,
                out,
                lse,
                *ctx.settings,
                needed,
                ctx.backend,
            )
        return *gradients, *(None,) * 9


# 3. Eager calls go straight to the backend; a tracer sees one opaque operator


def attention_varlen_forward(
    query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p, return_lse, backend
):
    arguments = query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p
    if isinstance(backend, ModuleType):
        return backend.attention_varlen_forward(*arguments)
    return torch.ops.fastlm.attention_varlen_forward(*arguments, return_lse, backend)


def attention_varlen_backward(
    dout,
    dlse,
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    seed,
    out,
    lse,
    scale,
    lower,
    upper,
    dropout_p,
    return_lse,
    needed,
    backend,
):
    arguments = (
        dout,
        dlse,
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        seed,
        out,
        lse,
        scale,
        lower,
        upper,
        dropout_p,
    )
    if isinstance(backend, ModuleType) and not opaque(dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k):
        return backend.attention_varlen_backward(*arguments, needed)
    gradients = torch.ops.fastlm.attention_varlen_backward(*arguments, return_lse, needed, backends.name_of(backend))
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


@torch.library.custom_op("fastlm::attention_varlen_forward", mutates_args=())
def attention_varlen_forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    scale: float,
    lower: int,
    upper: int,
    dropout_p: float,
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    serves = serving(query, key, cu_seqlens_q, lower, upper, seed is not None, return_lse, backend)
    return serves.attention_varlen_forward(
        query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p
    )


@torch.library.custom_op("fastlm::attention_varlen_backward", mutates_args=())
def attention_varlen_backward_op(
    dout: Tensor | None,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    lower: int,
    upper: int,
    dropout_p: float,
    return_lse: bool,
    needed: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    serves = serving(query, key, cu_seqlens_q, lower, upper, seed is not None, return_lse, backend)
    return present(
        query,
        *serves.attention_varlen_backward(
            dout,
            dlse,
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            seed,
            out,
            lse,
            scale,
            lower,
            upper,
            dropout_p,
            needed,
        ),
    )


# 4. Shapes, dtypes and strides of the results, for tracing, and their cost


@attention_varlen_forward_op.register_fake
def attention_varlen_forward_fake(
    query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, lower, upper, dropout_p, return_lse, backend
):
    total_q, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(
        heads, total_q, dtype=torch.promote_types(query.dtype, torch.float32)
    )


@attention_varlen_backward_op.register_fake
def attention_varlen_backward_fake(
    dout,
    dlse,
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    seed,
    out,
    lse,
    scale,
    lower,
    upper,
    dropout_p,
    return_lse,
    needed,
    backend,
):
    return present(
        query, *(x.new_empty(x.shape) if need else None for x, need in zip((query, key, value), needed, strict=True))
    )


# As for attention, sequence by sequence. While tracing no lengths are known, and equal ones are counted.


def pairs(query, key, cu_seqlens_q, cu_seqlens_k):
    """How many queries stand before how many keys."""
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.is_meta:
        return query.shape[0] * key.shape[0] // max(1, cu_seqlens_q.shape[0] - 1)
    lengths = (
        [end - start for start, end in itertools.pairwise(starts.tolist())] for starts in (cu_seqlens_q, cu_seqlens_k)
    )
    return sum(q * k for q, k in zip(*lengths, strict=True))


@register_flop_formula(torch.ops.fastlm.attention_varlen_forward, get_raw=True)
def attention_varlen_forward_flops(query, key, value, cu_seqlens_q, cu_seqlens_k, *args, **kwargs) -> int:
    return 4 * query.shape[1] * query.shape[2] * pairs(query, key, cu_seqlens_q, cu_seqlens_k)


@register_flop_formula(torch.ops.fastlm.attention_varlen_backward, get_raw=True)
def attention_varlen_backward_flops(dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k, *args, **kwargs) -> int:
    return 10 * query.shape[1] * query.shape[2] * pairs(query, key, cu_seqlens_q, cu_seqlens_k)
