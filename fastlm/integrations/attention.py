"""fastlm's attention behind transformers' attention interface: attn_implementation="fastlm", for every model that computes attention through it.

Masks come in three kinds. None: nothing is hidden but by causality, which the module or the call asks for. 2-D, (batch, keys): padding; of dtype bool for
attention in both directions and uint8 for causal attention, so that causality travels with the mask: what a module or a caller says about it is lost once
there is a mask (transformers 4.57's GPT-2 says is_causal=False then). 4-D: everything else, as PyTorch's attention takes it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

import fastlm
from fastlm.backends import Unsupported
from fastlm.integrations.capture import attentions_wanted
from fastlm.integrations.patch import eager, transformed
from fastlm.ops.boundary import mismatch

NAME = "fastlm"
CAUSAL = torch.uint8  # the dtype of a 2-D mask that is causal too


def register() -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


# 1. Masks


def mask(**asked: Any) -> Tensor | None:
    """What transformers calls, once per forward, to describe who sees whom: None or 2-D for causality and padding, whatever the sizes; else 4-D."""
    padding, kv_length, kv_offset = asked.get("attention_mask"), asked["kv_length"], asked.get("kv_offset", 0)
    window = asked.get("local_size")
    causal = asked.get("allow_is_causal_skip", True)  # false: not plain causality, or someone needs the mask in full
    bidirectional = not causal and asked.get("allow_is_bidirectional_skip", False)
    plain = window is None or kv_length < window  # a window that hides nothing
    if causal and window is None and asked.get("mask_function", causal_mask_function) is not causal_mask_function:
        plain = False
    if (
        isinstance(kv_offset, Tensor)
        or not plain
        or not (bidirectional or (causal and ends_together(asked, kv_length, kv_offset)))
    ):
        return sdpa_mask(**{**asked, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    if padding is None:
        return None
    if (missing := kv_offset + kv_length - padding.shape[-1]) > 0:
        padding = F.pad(padding, (0, missing))
    padding = padding[:, kv_offset : kv_offset + kv_length].bool()
    if padding.is_cpu and eager(padding) and padding.all():  # elsewhere looking would wait for the GPU
        return None
    return padding.to(CAUSAL) if causal else padding


def ends_together(asked: dict, kv_length: int, kv_offset: int) -> bool:
    """Whether the last query sees the last key: all that attention knows of positions. Not so in a static cache, whose end is empty."""
    position = asked.get("cache_position")  # how transformers 4.57 says where the queries are
    if position is None:
        offset = asked.get("q_offset", 0)
        return not isinstance(offset, Tensor) and offset + asked["q_length"] == kv_offset + kv_length
    queries = position.shape[0]
    if queries == kv_length:
        return True
    return (
        position.is_cpu
        and eager(position)
        and bool((position == torch.arange(kv_length - queries, kv_length) + kv_offset).all())
    )


def padding_of(mask: Tensor | None) -> Tensor | None:
    """(batch, keys), True = a real token, of a mask that hides the same keys from every query and does nothing else; None for any other."""
    if mask is None or mask.dtype == CAUSAL:
        return None
    if mask.dim() == 2:
        return mask if mask.dtype == torch.bool else mask != 0
    if mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if mask.shape[2] > 1 and mask.stride(2) != 0 and not (mask.is_cpu and bool((mask == mask[:, :, :1]).all())):
        return None
    keys = mask[:, 0, 0]
    if keys.dtype == torch.bool:
        return keys
    hidden = keys <= torch.finfo(keys.dtype).min
    return (
        ~hidden if mask.is_cpu and bool((hidden | (keys == 0)).all()) else None
    )  # a bias that is neither is more than padding


# 2. Attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    head_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every layer.

    Args:
        query, key, value: (batch, heads, length, head_dim); fewer key heads than query heads are grouped.
        attention_mask: as `mask` makes it, or the user's own, 4-D.
        is_causal: of a call without a mask; None: as the module says.
        position_bias: added to the scaled scores.
        sliding_window: of a call without a mask.

    Returns:
        (batch, length, heads, head_dim) and, if someone asks for them, the attention weights.

    Raises:
        fastlm.Unsupported: soft-capped scores, attention sinks, sequences packed by cu_seq_lens without position_ids.
    """
    for name, what in (("softcap", "soft-capped scores"), ("s_aux", "attention sinks")):
        if others.get(name) is not None:
            raise Unsupported(
                f"attn_implementation={NAME!r}: {what} ({name}) are not supported; use another implementation for this model"
            )
    if attention_mask is None and others.get("cu_seq_lens_q") is not None:
        raise Unsupported(
            f"attn_implementation={NAME!r}: cu_seq_lens_q without position_ids is not supported; pass position_ids of the packed sequences"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    wanted = output_attentions or head_mask is not None or attentions_wanted()
    return attend(
        query,
        key,
        value,
        attention_mask,
        causal,
        scaling,
        dropout,
        head_mask,
        position_bias,
        sliding_window,
        bool(wanted),
    )


def attend(
    query, key, value, mask, causal, scale, dropout_p, head_mask=None, bias=None, window=None, weights_wanted=False
):
    """(batch, query_len, heads, value_dim) and None or the weights. causal and window are for a mask of None: another says it itself."""
    key_padding = None
    sides = None
    if mask is None:
        if window is not None and window < key.shape[2]:
            sides = (window - 1, None) if causal else (window, window)
    elif mask.dim() == 2:
        causal = mask.dtype == CAUSAL
        key_padding, mask = mask.view(torch.bool) if causal else mask, None
        key_padding = key_padding if key_padding.dtype == torch.bool else key_padding != 0
    elif mask.dim() == 4:
        causal, mask = False, mask[..., : key.shape[2]]  # a static cache's mask may be longer
    else:
        raise mismatch("attention_mask", "2 or 4 dimensions", tuple(mask.shape))
    if bias is not None:
        mask = (
            bias if mask is None else torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
        )
    if weights_wanted or transformed():
        return with_weights(query, key, value, mask, key_padding, causal, sides, scale, dropout_p, head_mask)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim != head_dim:
        scale = head_dim**-0.5 if scale is None else scale
        query, key, value = (F.pad(x, (0, max(head_dim, value_dim) - x.shape[-1])) for x in (query, key, value))
    out = fastlm.attention(
        query,
        key,
        value,
        causal=causal,
        mask=mask,
        key_padding=key_padding,
        window=sides,
        scale=scale,
        dropout_p=dropout_p,
    )
    out = out.transpose(1, 2)
    return (out if value_dim == head_dim else out[..., :value_dim]), None


def with_weights(query, key, value, mask, key_padding, causal, sides, scale, dropout_p, head_mask):
    """Attention by its formula, as transformers' own "eager", which keeps the weights because someone asked to see them."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    lowest = torch.finfo(scores.dtype).min
    hidden = torch.zeros(1, 1, *scores.shape[2:], dtype=torch.bool, device=scores.device)
    ahead = (
        torch.arange(key.shape[2], device=key.device)
        - torch.arange(query.shape[2], device=key.device)[:, None]
        - (key.shape[2] - query.shape[2])
    )
    if causal:
        hidden = hidden | (ahead > 0)
    for side, beyond in zip(sides or (None, None), (-ahead, ahead), strict=True):
        hidden = hidden if side is None else hidden | (beyond > side)
    if key_padding is not None:
        hidden = hidden | ~key_padding[:, None, None]
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        scores = scores + mask
    weights = F.dropout(scores.masked_fill(hidden, lowest).softmax(-1).to(value.dtype), dropout_p)
    weights = weights if head_mask is None else weights * head_mask
    return (weights @ value).transpose(1, 2).contiguous(), weights
