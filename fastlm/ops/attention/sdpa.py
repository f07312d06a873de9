"""fastlm.scaled_dot_product_attention: attention with PyTorch's signature and its top-left causal alignment."""

import torch
from torch import Tensor

from fastlm.core.autocast import autocast_enabled, cast_for_autocast
from fastlm.core.errors import check_flag, check_tensor, mismatch
from fastlm.ops.attention.api import banded, check, check_tensors
from fastlm.ops.attention.spec import UNLIMITED
from fastlm.ops.operator import check_memory


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, which documents it, with fastlm's masking and memory layout.

    Args:
        query: (..., heads, query_len, head_dim); any number of leading dimensions, also none.
        key: (..., num_kv_heads, key_len, head_dim); leading dimensions broadcast against query's.
        value: (..., num_kv_heads, key_len, value_dim); value_dim may differ from head_dim (the narrower of the two is
            then padded, a copy).
        attn_mask: broadcastable to (..., heads, query_len, key_len); bool (True = attend) or additive, in query's dtype
            or float32.
        is_causal: query i attends to keys 0 … i, aligned top-left, also where the lengths differ; an error together
            with attn_mask, as in PyTorch.
        enable_gqa: num_kv_heads may be a divisor of heads.
        dropout_p, scale, backend: as for fastlm.attention.

    Raises:
        TypeError, ValueError, fastlm.Unsupported: as fastlm.attention.
    """
    check_tensors(query, key, value, None)
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask)
    check_memory(("query", "key", "value", "attn_mask"), query, key, value, attn_mask)
    is_causal, enable_gqa = check_flag("is_causal", is_causal), check_flag("enable_gqa", enable_gqa)
    if is_causal and attn_mask is not None:
        raise mismatch(
            "attn_mask", "None together with is_causal=True, as in PyTorch", f"a mask of shape {tuple(attn_mask.shape)}"
        )
    if autocast_enabled(query):
        query, key, value = cast_for_autocast(query, key, value)
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32):
            attn_mask = attn_mask.to(query.dtype)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2 or tensor.shape[-1] == 0:
            raise mismatch(
                name,
                "at least two dimensions, (..., length, head_dim), the last of size 1 or more",
                tuple(tensor.shape),
            )
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale

    try:
        lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        leads = f"{tuple(key.shape[:-3])} and {tuple(value.shape[:-3])}"
        expected = f"leading dimensions that broadcast with query's {tuple(query.shape[:-3])}"
        raise mismatch("key and value", expected, leads) from None
    flat = query.dim() == key.dim() == value.dim() == 2
    query, key, value = (four_dimensions(x, lead) for x in (query, key, value))
    mask = attn_mask
    if mask is not None:
        try:
            mask = four_dimensions(mask, lead if mask.dim() > 4 or len(lead) > 1 else mask.shape[:-3])
        except RuntimeError:
            expected = f"a shape that broadcasts to {(*lead, query.shape[-3], query.shape[-2], key.shape[-2])}"
            raise mismatch("attn_mask", expected, tuple(mask.shape)) from None
    if query.shape[1] != key.shape[1] and not enable_gqa and key.shape[1] != 1:
        raise mismatch("key", f"query's number of heads, {query.shape[1]}, without enable_gqa=True", key.shape[1])
    if value_dim != head_dim:
        if key.shape[-1] != head_dim:
            raise mismatch("key", f"the head_dim of query, {head_dim}", key.shape[-1])
        width = max(head_dim, value_dim)
        query, key, value = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    check(query, key, value, mask, None, "attn_mask")
    upper = 0 if is_causal else UNLIMITED
    out = banded(query, key, value, mask, None, scale, 0.0, -UNLIMITED, upper, dropout_p, False, backend)
    if value_dim != head_dim:
        out = out[..., :value_dim]
    if flat:
        return out[0, 0]
    if not lead:
        return out[0]
    return out if len(lead) == 1 else out.unflatten(0, lead)


def four_dimensions(x: Tensor, lead: torch.Size) -> Tensor:
    """x as (batch, heads, …, …), a view if strides allow: leading dimensions are broadcast and merged, or added."""
    if x.dim() == 4 and x.shape[:1] == lead:
        return x
    x = x[(None,) * (3 - x.dim())] if x.dim() < 3 else x
    return x.expand(*lead, *x.shape[-3:]).reshape(-1, *x.shape[-3:])
