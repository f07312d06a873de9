"""fastlm.attention_varlen: attention of a packed batch, whose sequences follow one another without padding."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_for_autocast
from fastlm.core.errors import (
    check_flag,
    check_floating,
    check_like,
    check_probability,
    check_softcap,
    check_tensor,
    mismatch,
)
from fastlm.ops.attention.api import band, check_scale, check_tensors
from fastlm.ops.attention.autograd import operator
from fastlm.ops.attention.spec import Forward
from fastlm.ops.operator import check_memory


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
    softcap: float | None = ...,
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
    softcap: float | None = ...,
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
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastlm.attention` within each sequence of a packed batch: the results of a padded batch, without the padding.

    Sequence b has the queries cu_seqlens_q[b] … cu_seqlens_q[b + 1] − 1 and the keys cu_seqlens_k[b] …
    cu_seqlens_k[b + 1] − 1. Either may be empty: queries without keys get 0. causal and window are aligned bottom-right
    in each sequence, as in `fastlm.attention`. Dropout drops the same weights as in the padded batch. For
    self-attention in sequences of 3, 1 and 4 tokens both cu_seqlens are tensor([0, 3, 4, 8]).

    Args:
        query: (total_q, heads, head_dim), floating point, any strides, such as views of one packed projection. Under
            autocast query, key and value are cast to its dtype.
        key, value: (total_k, num_kv_heads, head_dim), dtype and device of query; heads is a multiple of num_kv_heads
            (grouped-query attention).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,), int32 or int64, on query's device: 0, then the end of each sequence.
            On a GPU the backends triton and cuda read them on the device, and invalid values are a device assert;
            torch and reference copy them to the host, which synchronises.
        causal: a query attends to no key after it.
        window: (left, right): a query attends to so many keys before and after its own position, which it always
            includes; None on a side = unlimited.
        scale: of the scores; None = 1 / √head_dim.
        softcap: positive, or None: the scaled scores s become softcap · tanh(s / softcap) before they are masked (Gemma
            2).
        dropout_p: probability of zeroing an attention weight, in [0, 1); active whenever > 0 (a module passes 0 in
            eval).
        return_lse: also return the log-sum-exp of the scaled, capped and masked scores.
        backend: force one backend by name; None selects automatically (see fastlm.info()).

    Returns:
        (total_q, heads, head_dim) in query's dtype, contiguous; with return_lse also (heads, total_q) in float32
        (float64 for float64). A fully masked query gets 0, with lse −inf.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, supports this call; the message lists the reasons.
    """
    check_tensors(query, key, value, None)
    if autocast_enabled(query):
        check_memory(("query", "key", "value"), query, key, value)
        query, key, value = cast_for_autocast(query, key, value)
    check(query, key, value, cu_seqlens_q, cu_seqlens_k)
    dropout_p = check_probability("dropout_p", dropout_p)
    return_lse = check_flag("return_lse", return_lse)
    scale = check_scale(scale, query)
    lower, upper = band(causal, window, 0)  # each sequence moves it to its own last key
    seed = operator.draw_seed(query, dropout_p)
    out, lse = operator(
        Forward(
            query,
            key,
            value,
            None,
            None,
            cu_seqlens_q,
            cu_seqlens_k,
            seed,
            scale,
            check_softcap(softcap),
            lower,
            upper,
            dropout_p,
            return_lse,
            False,
        ),
        backend,
    )
    return (out, lse) if return_lse else out


def check(query, key, value, cu_seqlens_q, cu_seqlens_k):
    """Check everything but the values of cu_seqlens, which the backends check where they read them."""
    query_shape, key_shape = query.shape, key.shape
    if len(query_shape) != 3 or query_shape[2] == 0 or query_shape[1] == 0:
        raise mismatch(
            "query", "shape (total_q, heads, head_dim), at least one head and head_dim 1 or more", tuple(query_shape)
        )
    check_floating("query", query)
    _, heads, head_dim = query_shape
    if len(key_shape) != 3 or key_shape[2] != head_dim:
        raise mismatch("key", f"shape (total_k, num_kv_heads, {head_dim}), as query", tuple(key_shape))
    if key_shape[1] == 0 or heads % key_shape[1]:
        raise mismatch("key", f"a number of heads that divides query's {heads}", key_shape[1])
    if value.shape != key_shape:
        raise mismatch("value", f"shape {tuple(key_shape)}, as key", tuple(value.shape))
    check_like("key", key, query, "query")
    check_like("value", value, query, "query")
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise mismatch(name, "shape (batch + 1,), 0 and the end of each sequence", tuple(cu_seqlens.shape))
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != query.device:
            raise mismatch(
                name, f"torch.int32 or torch.int64 on {query.device}", f"{cu_seqlens.dtype} on {cu_seqlens.device}"
            )
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise mismatch("cu_seqlens_k", f"shape {tuple(cu_seqlens_q.shape)}, as cu_seqlens_q", tuple(cu_seqlens_k.shape))
