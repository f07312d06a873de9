"""The public function: checks and documentation."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_for_autocast
from fastlm.core.errors import check_like, check_probability, mismatch
from fastlm.ops.attention.autograd import operator
from fastlm.ops.attention.spec import UNLIMITED, Forward


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
    """Scaled dot-product attention. All masks are combined: a query attends to a key where every mask allows it.

    causal and window are aligned bottom-right: the last query attends to the last key. With 2 queries, 4 keys and

        causal      1 1 1 0      window=(1, 0)   0 1 1 0      window=(1, None)   0 1 1 1
                    1 1 1 1                      0 0 1 1                         0 0 1 1

    Args:
        query: (batch, heads, query_len, head_dim), floating point, any strides. Under autocast query, key and value are
            cast to its dtype.
        key, value: (batch, num_kv_heads, key_len, head_dim), dtype and device of query; heads is a multiple of
            num_kv_heads (grouped-query attention).
        causal: a query attends to no key after it.
        mask: 4-D, each size 1 or the full one; it is never expanded in memory. Bool: True = attend. Floating point
            (query's dtype or float32): added to the scaled scores; −inf masks. A mask that requires a gradient gets
            one.
        key_padding: (batch, key_len), bool, True = a real token.
        scale: of the scores; None = 1 / √head_dim.
        window: (left, right): a query attends to so many keys before and after its own position, which it always
            includes; None on a side = unlimited.
        dropout_p: probability of zeroing an attention weight, in [0, 1); active whenever > 0 (a module passes 0 in
            eval).
        return_lse: also return the log-sum-exp of the scaled and masked scores.
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Returns:
        (batch, heads, query_len, head_dim) in query's dtype, stored as (batch, query_len, heads, head_dim), so that
        merging the heads is a view; with return_lse also (batch, heads, query_len) in float32 (float64 for float64). A
        fully masked query gets 0, with lse −inf. A masked value, NaN too, never reaches the result.

    Raises:
        ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    if autocast_enabled(query):
        query, key, value = cast_for_autocast(query, key, value)
        mask = mask if mask is None or mask.dtype in (torch.bool, torch.float32) else mask.to(query.dtype)
    check(query, key, value, mask, key_padding)
    lower, upper = band(causal, window, key.shape[2] - query.shape[2])
    return banded(query, key, value, mask, key_padding, scale, lower, upper, dropout_p, return_lse, backend)


def band(causal: bool, window: tuple[int | None, int | None] | None, offset: int) -> tuple[int, int]:
    """(lower, upper): query i attends to key j iff lower ≤ j − i ≤ upper. Query 0 has the position of key `offset`."""
    lower, upper = -UNLIMITED, offset if causal else UNLIMITED
    if window is not None:
        left, right = check_window(window)
        lower = lower if left is None else offset - left
        upper = upper if right is None or causal else offset + right
    return lower, upper


def banded(query, key, value, mask, key_padding, scale, lower, upper, dropout_p, return_lse, backend):
    """Attention of a dense batch within a band."""
    check_probability("dropout_p", dropout_p)
    scale = check_scale(scale, query.shape[-1])
    mask_gradient = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    seed = operator.draw_seed(query, dropout_p)
    out, lse = operator(
        Forward(
            query,
            key,
            value,
            mask,
            key_padding,
            None,
            None,
            seed,
            scale,
            lower,
            upper,
            dropout_p,
            return_lse,
            mask_gradient,
        ),
        backend,
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
        raise mismatch("key", f"shape ({batch}, num_kv_heads, key_len, {head_dim}), as query", tuple(key.shape))
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


def check_scale(scale, head_dim):
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
