"""The public function: checks and documentation."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_for_autocast
from fastlm.core.errors import (
    check_flag,
    check_floating,
    check_like,
    check_number,
    check_probability,
    check_softcap,
    check_tensor,
    mismatch,
    shown,
)
from fastlm.ops.attention.autograd import operator
from fastlm.ops.attention.spec import UNLIMITED, Forward
from fastlm.ops.operator import check_memory

FLOAT32_MAX = torch.finfo(torch.float32).max


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
    softcap: float | None = ...,
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
    softcap: float | None = ...,
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
    softcap: float | None = None,
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
        softcap: positive, or None: the scaled scores s become softcap · tanh(s / softcap) before they are masked (Gemma
            2).
        window: (left, right): a query attends to so many keys before and after its own position, which it always
            includes; None on a side = unlimited.
        dropout_p: probability of zeroing an attention weight, in [0, 1); active whenever > 0 (a module passes 0 in
            eval).
        return_lse: also return the log-sum-exp of the scaled, capped and masked scores.
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Returns:
        (batch, heads, query_len, head_dim) in query's dtype, stored as (batch, query_len, heads, head_dim), so that
        merging the heads is a view; with return_lse also (batch, heads, query_len) in float32 (float64 for float64). A
        fully masked query gets 0, with lse −inf. A masked value, NaN too, never reaches the result.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    check_tensors(query, key, value, mask)
    if autocast_enabled(query):
        check_memory(("query", "key", "value", "mask"), query, key, value, mask)
        query, key, value = cast_for_autocast(query, key, value)
        mask = mask if mask is None or mask.dtype in (torch.bool, torch.float32) else mask.to(query.dtype)
    check(query, key, value, mask, key_padding)
    lower, upper = band(causal, window, key.shape[2] - query.shape[2])
    softcap = check_softcap(softcap)
    return banded(query, key, value, mask, key_padding, scale, softcap, lower, upper, dropout_p, return_lse, backend)


def band(causal: bool, window: tuple[int | None, int | None] | None, offset: int) -> tuple[int, int]:
    """(lower, upper): query i attends to key j iff lower ≤ j − i ≤ upper. Query 0 has the position of key `offset`."""
    causal = check_flag("causal", causal)
    lower, upper = -UNLIMITED, offset if causal else UNLIMITED
    if window is not None:
        left, right = check_window(window)
        lower = lower if left is None or left >= UNLIMITED else offset - left
        upper = upper if right is None or right >= UNLIMITED or causal else offset + right
    return lower, upper


def banded(query, key, value, mask, key_padding, scale, softcap, lower, upper, dropout_p, return_lse, backend):
    """Attention of a dense batch within a band."""
    dropout_p = check_probability("dropout_p", dropout_p)
    return_lse = check_flag("return_lse", return_lse)
    scale = check_scale(scale, query)
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
            softcap,
            lower,
            upper,
            dropout_p,
            return_lse,
            mask_gradient,
        ),
        backend,
    )
    return (out, lse) if return_lse else out


def check_tensors(query, key, value, mask):
    check_tensor("query", query)
    check_tensor("key", key)
    check_tensor("value", value)
    if mask is not None:
        check_tensor("mask", mask)


def check(query, key, value, mask, key_padding, mask_name="mask"):
    query_shape, key_shape = query.shape, key.shape
    if len(query_shape) != 4 or query_shape[3] == 0 or query_shape[1] == 0:
        raise mismatch(
            "query",
            "shape (batch, heads, query_len, head_dim), at least one head and head_dim 1 or more",
            tuple(query_shape),
        )
    check_floating("query", query)
    batch, heads, query_len, head_dim = query_shape
    if len(key_shape) != 4 or key_shape[0] != batch or key_shape[3] != head_dim:
        raise mismatch("key", f"shape ({batch}, num_kv_heads, key_len, {head_dim}), as query", tuple(key_shape))
    if key_shape[1] == 0 or heads % key_shape[1]:
        raise mismatch("key", f"a number of heads that divides query's {heads}", key_shape[1])
    if value.shape != key_shape:
        raise mismatch("value", f"shape {tuple(key_shape)}, as key", tuple(value.shape))
    check_like("key", key, query, "query")
    check_like("value", value, query, "query")
    if mask is not None:
        full = (batch, heads, query_len, key_shape[2])
        if mask.dim() != 4 or any(size not in (1, wanted) for size, wanted in zip(mask.shape, full, strict=True)):
            raise mismatch(mask_name, f"4 dimensions, each 1 or that of {full}, as query and key", tuple(mask.shape))
        if mask.device != query.device or (
            mask.dtype not in (torch.bool, query.dtype) and (mask.dtype != torch.float32 or query.dtype.itemsize > 2)
        ):
            raise mismatch(
                mask_name,
                f"torch.bool, {query.dtype} or torch.float32 on {query.device}",
                f"{mask.dtype} on {mask.device}",
            )
    if key_padding is not None:
        check_tensor("key_padding", key_padding)
        if key_padding.shape != (batch, key_shape[2]):
            raise mismatch(
                "key_padding",
                f"shape {(batch, key_shape[2])}, (batch, key_len) of query and key",
                tuple(key_padding.shape),
            )
        if key_padding.dtype != torch.bool or key_padding.device != query.device:
            raise mismatch(
                "key_padding",
                f"torch.bool on {query.device}, True = a real token",
                f"{key_padding.dtype} on {key_padding.device}",
            )


def check_scale(scale, query):
    """The scale of the scores: 1 / √head_dim unless one is given."""
    if scale is None:
        return query.shape[-1] ** -0.5
    scale = check_number("scale", scale)
    if not -FLOAT32_MAX <= scale <= FLOAT32_MAX and query.dtype != torch.float64:
        raise mismatch("scale", "a number that is finite in float32", scale)
    return scale


def check_window(window):
    expected = "(left, right), each None or an integer of 0 or more"
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise mismatch("window", expected, shown(window))
    for side in window:
        if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < 0):
            raise mismatch("window", expected, f"({', '.join(map(shown, window))})")
    return window
