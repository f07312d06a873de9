"""fastlm's attention as an implementation of transformers' attention interface: attn_implementation="fastlm".

There are three kinds of masks:
- None: no mask. The module or the call says whether attention is causal; the call says its window.
- 2-D, (batch, keys): padding, of dtype bool for bidirectional and uint8 for causal attention. The dtype says it because
  the module and the call do not once there is a mask: GPT-2 of transformers 4.57 passes is_causal=False then.
  The call says the window.
- 4-D: any other mask, as PyTorch's attention takes it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from fastlm.backends import Unsupported
from fastlm.core.errors import mismatch
from fastlm.integrations.capture import captures_attentions
from fastlm.integrations.patch import sizes_may_depend_on_values, transform_reason
from fastlm.ops.attention import attention as attention_operator

NAME = "fastlm"
CAUSAL = torch.uint8  # the dtype of a 2-D mask of causal attention


# Masks


def mask(**arguments: Any) -> Tensor | None:
    """Called by transformers once per forward pass and kind of layer.

    None or 2-D for causality and padding, otherwise 4-D. A window that hides keys is 4-D, unless all layers are of
    supported families: these pass it to the attention, which computes only what it does not hide.
    """
    kv_length, kv_offset = arguments["kv_length"], arguments.get("kv_offset", 0)
    padding, window = arguments.get("attention_mask"), arguments.get("local_size")
    causal = arguments.get("allow_is_causal_skip", True)  # False: not only causal, or the caller needs the whole mask
    bidirectional = not causal and arguments.get("allow_is_bidirectional_skip", False)
    custom = arguments.get("mask_function", causal_mask_function) is not causal_mask_function
    if (
        isinstance(kv_offset, Tensor)
        or (window is not None and kv_length >= window and not is_view(arguments.get("config")))
        or (causal and window is None and custom)
        or not (bidirectional or (causal and is_aligned_right(arguments, kv_length, kv_offset)))
    ):
        return sdpa_mask(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    if padding is None:
        return None
    if (missing := kv_offset + kv_length - padding.shape[-1]) > 0:
        padding = F.pad(padding, (0, missing))
    padding = padding[:, kv_offset : kv_offset + kv_length].bool()
    if padding.is_cpu and sizes_may_depend_on_values(padding) and padding.all():  # on a GPU it would synchronize
        return None
    return padding.to(CAUSAL) if causal else padding


def is_view(config: Any) -> bool:
    """Whether this is the configuration of an accelerated model, as views.py makes it."""
    return hasattr(type(config), "fastlm_original")


def is_aligned_right(arguments: dict, kv_length: int, kv_offset: int) -> bool:
    """Whether the last query is at the position of the last key, as `fastlm.attention` assumes.

    It is not in a static cache, which ends with unused keys.
    """
    position = arguments.get("cache_position")  # positions of the queries in transformers 4.57
    if position is None:
        offset = arguments.get("q_offset", 0)
        return not isinstance(offset, Tensor) and offset + arguments["q_length"] == kv_offset + kv_length
    queries = position.shape[0]
    if queries == kv_length:
        return True
    if not (position.is_cpu and sizes_may_depend_on_values(position)):
        return False
    return bool((position == torch.arange(kv_length - queries, kv_length) + kv_offset).all())


def padding_of(mask: Tensor | None) -> Tensor | None:
    """The padding that a mask describes: (batch, keys), True for real tokens.

    None if the mask does not hide the same keys from every query, or is a bias.
    """
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
    is_padding = mask.is_cpu and bool((hidden | (keys == 0)).all())  # other values are a bias
    return ~hidden if is_padding else None


# Attention


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
    softcap: float | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Called by transformers in every layer.

    Args:
        query: (batch, num_heads, query_len, head_dim).
        key, value: (batch, num_kv_heads, key_len, head_dim). Query heads share key heads in groups.
        attention_mask: a result of `mask`, or a 4-D mask of the user's.
        is_causal: for a call without a mask. None: as the module's attribute says.
        position_bias: added to the scaled scores.
        sliding_window: for a call without a mask or with a 2-D one: the keys up to the query's own, on each side that
            is not causal.
        softcap: of the scaled scores, before they are masked.

    Returns:
        (batch, query_len, num_heads, head_dim), and the attention weights if they are asked for, otherwise None.

    Raises:
        fastlm.Unsupported: attention sinks, packed sequences given by cu_seq_lens alone, a position_bias with softcap.
    """
    if others.get("s_aux") is not None:
        raise Unsupported(
            f"attn_implementation={NAME!r}: attention sinks (s_aux) are not supported; "
            "use another implementation for this model"
        )
    if softcap is not None and position_bias is not None:
        raise Unsupported(f"attn_implementation={NAME!r}: softcap with position_bias is not supported")
    if attention_mask is None and others.get("cu_seq_lens_q") is not None:
        raise Unsupported(
            f"attn_implementation={NAME!r}: cu_seq_lens_q without position_ids is not supported; "
            "pass position_ids of the packed sequences"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if output_attentions is None:  # transformers 4 does not pass what the configuration says
        output_attentions = getattr(getattr(module, "config", None), "output_attentions", False)
    return_weights = bool(output_attentions or head_mask is not None or captures_attentions())
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
        softcap,
        return_weights,
    )


def attend(
    query,
    key,
    value,
    mask,
    causal,
    scale,
    dropout_p,
    head_mask=None,
    bias=None,
    window=None,
    softcap=None,
    return_weights=False,
):
    """(batch, query_len, num_heads, value_dim), and the weights or None.

    A mask replaces causal, and a 4-D one also window.
    """
    key_padding = None
    sides = None
    if mask is not None and mask.dim() == 2:
        causal = mask.dtype == CAUSAL
        key_padding, mask = mask.view(torch.bool) if causal else mask, None
        key_padding = key_padding if key_padding.dtype == torch.bool else key_padding != 0
    if mask is None:
        if window is not None and window < key.shape[2]:
            sides = (window - 1, None if causal else window - 1)
    elif mask.dim() == 4:
        causal, mask = False, mask[..., : key.shape[2]]  # the mask of a static cache may be longer
    else:
        raise mismatch("attention_mask", "2 or 4 dimensions", tuple(mask.shape))
    if bias is not None and mask is not None:
        mask = torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
    elif bias is not None:
        mask = bias
    if return_weights or transform_reason():
        return attend_eagerly(query, key, value, mask, key_padding, causal, sides, scale, softcap, dropout_p, head_mask)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim != head_dim:
        scale = head_dim**-0.5 if scale is None else scale
        query, key, value = (F.pad(x, (0, max(head_dim, value_dim) - x.shape[-1])) for x in (query, key, value))
    out = attention_operator(
        query,
        key,
        value,
        causal=causal,
        mask=mask,
        key_padding=key_padding,
        window=sides,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    out = out.transpose(1, 2)
    return (out if value_dim == head_dim else out[..., :value_dim]), None


def attend_eagerly(query, key, value, mask, key_padding, causal, sides, scale, softcap, dropout_p, head_mask):
    """Attention by PyTorch operators, as transformers' "eager" computes it, with the weights."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    query_len, key_len = scores.shape[2:]
    hidden = torch.zeros(1, 1, query_len, key_len, dtype=torch.bool, device=scores.device)
    keys, queries = torch.arange(key_len, device=key.device), torch.arange(query_len, device=key.device)
    distance = keys - queries[:, None] - (key_len - query_len)  # of a key behind a query
    if causal:
        hidden = hidden | (distance > 0)
    left, right = sides or (None, None)
    if left is not None:
        hidden = hidden | (-distance > left)
    if right is not None:
        hidden = hidden | (distance > right)
    if key_padding is not None:
        hidden = hidden | ~key_padding[:, None, None]
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        scores = scores + mask
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).to(value.dtype)
    weights = F.dropout(weights, dropout_p)
    weights = weights if head_mask is None else weights * head_mask
    return (weights @ value).transpose(1, 2).contiguous(), weights


# Here, because unpickling an accelerated model in a new process imports this module and not `transformers.py`. For a
# name without a mask function transformers makes no mask, so that padding would be attended to.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
