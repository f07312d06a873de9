"""softmax(q kᵀ · scale + mask) v, by tiles: query_len × key_len is never stored (Dao et al., 2022, arXiv:2205.14135)."""

import math
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastlm import backends
from fastlm.backends import reference
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

UNLIMITED = 2**62  # an edge of the band that no position reaches

# 1. The function people call


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = ...,
    mask: Tensor | None = ...,
    key_padding: Tensor | None = ...,
    scale: float | None = ...,
    window: tuple[int | None, int | None] | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = ...,
    mask: Tensor | None = ...,
    key_padding: Tensor | None = ...,
    scale: float | None = ...,
    window: tuple[int | None, int | None] | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    key_padding: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, with everything that masks it combined: a query sees a key where all of them let it.

    causal and window are aligned bottom-right: the last query sees the last key. With 2 queries, 4 keys and

        causal      1 1 1 0      window=(1, 0)   0 1 1 0      window=(1, None)   0 1 1 1
                    1 1 1 1                      0 0 1 1                         0 0 1 1

    Args:
        query: (batch, heads, query_len, head_dim), floating point, any strides. Under autocast query, key and value are cast to its dtype.
        key, value: (batch, key_heads, key_len, head_dim), dtype and device of query; heads is a multiple of key_heads (grouped queries).
        causal: a query sees no key after it.
        mask: 4-D, each size 1 or the full one; never expanded. Bool: True = attend. Floating point (query's dtype or float32): added to the
            scaled scores; −inf masks. A mask that requires a gradient gets one.
        key_padding: (batch, key_len), bool, True = a real token.
        scale: of the scores; None = 1 / √head_dim.
        window: (left, right): how many keys before and after its own position a query sees, its own always; None on a side = unlimited.
        dropout_p: probability of zeroing an attention weight, in [0, 1); active exactly when > 0 (a module passes 0 in eval).
        return_lse: also return the log-sum-exp of the scaled and masked scores.
        backend: force one backend by name; None takes the first that can (see fastlm.info()).

    Returns:
        (batch, heads, query_len, head_dim) in query's dtype, laid out as (batch, query_len, heads, head_dim), so that merging the heads is a
        view; with return_lse also (batch, heads, query_len) in float32 (float64 for float64). A query that sees nothing gets 0, with lse −inf.
        What stands in a masked place, NaN too, never reaches the result.

    Raises:
        ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, can serve this call; the message lists why.
    """
    if autocasts(query):
        query, key, value = lowered(query, key, value)
        mask = mask if mask is None or mask.dtype in (torch.bool, torch.float32) else mask.to(query.dtype)
    check(query, key, value, mask, key_padding)
    lower, upper = band(causal, window, key.shape[2] - query.shape[2])
    return banded(query, key, value, mask, key_padding, scale, lower, upper, dropout_p, return_lse, backend)


def band(causal, window, offset):
    """(lower, upper): position i sees j iff lower ≤ j − i ≤ upper, query 0 standing at key `offset`."""
    lower, upper = -UNLIMITED, offset if causal else UNLIMITED
    if window is not None:
        left, right = check_window(window)
        lower = lower if left is None else offset - left
        upper = upper if right is None or causal else offset + right
    return lower, upper


def banded(query, key, value, mask, key_padding, scale, lower, upper, dropout_p, return_lse, backend):
    """Attention where position i sees j iff lower ≤ j − i ≤ upper: what every way of asking comes down to."""
    check_probability("dropout_p", dropout_p)
    scale = finite_scale(scale, query.shape[-1])
    mask_gradient = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if opaque(query, key, value, mask, key_padding):
        backend = backends.requested(backend)
    else:  # once: the backward uses the same
        backend = serving(
            query, key, mask, key_padding, lower, upper, dropout_p > 0, return_lse, mask_gradient, backend
        )
    seed = draw_seed(query) if dropout_p > 0 else None
    if mask_gradient or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)):
        query, key, value = distinct(query, key, value)
        out, lse = Attention.apply(
            query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p, return_lse, backend
        )
    else:
        out, lse = attention_forward(
            query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p, return_lse, False, backend
        )
    return (out, lse) if return_lse else out


def check(query, key, value, mask, key_padding):
    if query.dim() != 4 or query.shape[3] == 0 or query.shape[1] == 0:
        raise mismatch(
            "query",
            "shape (batch, heads, query_len, head_dim), at least one head and head_dim 1 or more",
            tuple(query.shape),
        )
    if not query.dtype.is_floating_point:
        raise mismatch("query", "a floating-point tensor", query.dtype)
    batch, heads, query_len, head_dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != head_dim:
        raise mismatch("key", f"shape ({batch}, key_heads, key_len, {head_dim}), as query", tuple(key.shape))
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise mismatch("key", f"a number of heads that divides query's {heads}", key.shape[1])
    if value.shape != key.shape:
        raise mismatch("value", f"shape {tuple(key.shape)}, as key", tuple(value.shape))
    check_like("key", key, query, "query")
    check_like("value", value, query, "query")
    if mask is not None:
        full = (batch, heads, query_len, key.shape[2])
        if mask.dim() != 4 or any(size not in (1, wanted) for size, wanted in zip(mask.shape, full, strict=True)):
            raise mismatch("mask", f"4 dimensions, each 1 or that of {full}", tuple(mask.shape))
        if mask.device != query.device or (
            mask.dtype not in (torch.bool, query.dtype) and (mask.dtype != torch.float32 or query.dtype.itemsize > 2)
        ):
            raise mismatch(
                "mask",
                f"torch.bool, {query.dtype} or torch.float32 on {query.device}",
                f"{mask.dtype} on {mask.device}",
            )
    if key_padding is not None:
        if key_padding.shape != (batch, key.shape[2]):
            raise mismatch("key_padding", f"shape {(batch, key.shape[2])}, (batch, key_len)", tuple(key_padding.shape))
        if key_padding.dtype != torch.bool or key_padding.device != query.device:
            raise mismatch(
                "key_padding",
                f"torch.bool on {query.device}, True = a real token",
                f"{key_padding.dtype} on {key_padding.device}",
            )


def finite_scale(scale, head_dim):
    """The scale of the scores: 1 / √head_dim unless one is given."""
    if scale is None:
        return head_dim**-0.5
    if not abs(scale) < math.inf:
        raise mismatch("scale", "a finite number", scale)
    return float(scale)  # whole numbers are another type to a kernel


def check_window(window):
    if (
        not isinstance(window, tuple | list)
        or len(window) != 2
        or any(side is not None and (not isinstance(side, int) or side < 0) for side in window)
    ):
        raise mismatch("window", "(left, right), each None or an integer of 0 or more", window)
    return window


def serving(query, key, mask, key_padding, lower, upper, dropout, return_lse, mask_gradient, backend):
    batch, heads, query_len, head_dim = query.shape
    key_len = key.shape[2]
    masked = mask is not None or key_padding is not None or lower > 1 - query_len or upper < key_len - 1
    return backends.choose(
        "attention",
        query,
        query.dtype,
        backend,
        batch,
        heads,
        query_len,
        key_len,
        head_dim,
        masked,
        dropout,
        return_lse,
        mask_gradient,
    )


# 2. Autograd


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p, return_lse, backend):
        ctx.set_materialize_grads(False)
        settings = scale, lower, upper, dropout_p, return_lse
        out, lse = attention_forward(
            query, key, value, mask, key_padding, seed, *settings, ctx.needs_input_grad[3], backend
        )
        ctx.save_for_backward(query, key, value, mask, key_padding, seed, out, lse)
        ctx.settings, ctx.backend = settings, backend
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        query, key, value, mask, key_padding, seed, out, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if dout is None and dlse is None:
            gradients = (None,) * 4
        elif torch.is_grad_enabled():  # create_graph=True: gradients that can themselves be differentiated
            formula = lambda q, k, v, m: reference.attention(q, k, v, m, key_padding, seed, *ctx.settings[:4])  # noqa: E731
            gradients = differentiable_gradients(formula, (query, key, value, mask), needed, dout, dlse)
        else:
            gradients = attention_backward(
                dout, dlse, query, key, value, mask, key_padding, seed, out, lse, *ctx.settings, needed, ctx.backend
            )
        return *gradients, *(None,) * 8


def differentiable_gradients(formula, inputs, needed, dout, dlse):
    """Of the output (in the dtype of the query, the first input) and the log-sum-exp, as far as gradients have come in for them."""

    def differentiated(*inputs):
        out, lse = formula(*inputs)
        return [result for result, upstream in ((out.to(inputs[0].dtype), dout), (lse, dlse)) if upstream is not None]

    upstreams = [upstream for upstream in (dout, dlse) if upstream is not None]
    return reference.differentiable_gradients(differentiated, inputs, needed, upstreams)


# 3. Eager calls go straight to the backend; a tracer sees one opaque operator


def attention_forward(
    query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p, return_lse, mask_gradient, backend
):
    arguments = query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p
    if isinstance(backend, ModuleType):
        return backend.attention_forward(*arguments)
    return torch.ops.fastlm.attention_forward(*arguments, return_lse, mask_gradient, backend)


def attention_backward(
    dout,
    dlse,
    query,
    key,
    value,
    mask,
    key_padding,
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
    arguments = dout, dlse, query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p
    if isinstance(backend, ModuleType) and not opaque(dout, dlse, query, key, value, mask, key_padding):
        return backend.attention_backward(*arguments, needed)
    gradients = torch.ops.fastlm.attention_backward(*arguments, return_lse, needed, backends.name_of(backend))
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


@torch.library.custom_op("fastlm::attention_forward", mutates_args=())
def attention_forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding: Tensor | None,
    seed: Tensor | None,
    scale: float,
    lower: int,
    upper: int,
    dropout_p: float,
    return_lse: bool,
    mask_gradient: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    serves = serving(query, key, mask, key_padding, lower, upper, seed is not None, return_lse, mask_gradient, backend)
    out, lse = serves.attention_forward(query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p)
    return out, lse.contiguous()


@torch.library.custom_op("fastlm::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor | None,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    serves = serving(query, key, mask, key_padding, lower, upper, seed is not None, return_lse, needed[3], backend)
    return present(
        query,
        *serves.attention_backward(
            dout, dlse, query, key, value, mask, key_padding, seed, out, lse, scale, lower, upper, dropout_p, needed
        ),
    )


# 4. Shapes, dtypes and strides of the results, for tracing, and their cost


def tokens_first(x):
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


@attention_forward_op.register_fake
def attention_forward_fake(
    query, key, value, mask, key_padding, seed, scale, lower, upper, dropout_p, return_lse, mask_gradient, backend
):
    return tokens_first(query), query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@attention_backward_op.register_fake
def attention_backward_fake(
    dout,
    dlse,
    query,
    key,
    value,
    mask,
    key_padding,
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
    gradients = [tokens_first(x) if need else None for x, need in zip((query, key, value), needed[:3], strict=True)]
    return present(query, *gradients, mask.new_empty(mask.shape) if needed[3] else None)


# As PyTorch counts its own attention: two products forward, five backward (one recomputes the scores), masked or not.


@register_flop_formula(torch.ops.fastlm.attention_forward)
def attention_forward_flops(query, key, *args, out_shape=None, **kwargs) -> int:
    return 4 * math.prod(query) * key[2]


@register_flop_formula(torch.ops.fastlm.attention_backward)
def attention_backward_flops(dout, dlse, query, key, *args, out_shape=None, **kwargs) -> int:
    return 10 * math.prod(query) * key[2]
