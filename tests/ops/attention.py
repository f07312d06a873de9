"""Inputs of the attention tests, the visible keys of a call, and what PyTorch's operators compute."""

import torch
import torch.nn.functional as F

from tests.support import floats

# (batch, heads, num_kv_heads, query_len, key_len, head_dim): single elements, odd sizes near those of vectors and
# tiles, grouped queries, decoding, and enough keys that the largest score is not in the first tile.
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 3, 7, 7, 16),
    (1, 4, 2, 65, 65, 64),
    (2, 2, 1, 1, 130, 33),
    (1, 2, 2, 70, 37, 80),
    (1, 6, 2, 33, 129, 5),
    (1, 1, 1, 40, 40, 256),
    (1, 2, 1, 50, 400, 24),
]
MASK_SHAPES = [(2, 3, 9, 21), (1, 1, 9, 21), (2, 1, 1, 21), (1, 3, 9, 1), (1, 1, 1, 1), (2, 1, 9, 1)]
NON_FINITE = [torch.nan, torch.inf, -torch.inf]


def qkv(batch, heads, num_kv_heads, query_len, key_len, head_dim):
    key, value = (
        floats(batch, num_kv_heads, key_len, head_dim),
        floats(head_dim, num_kv_heads, key_len, batch).permute(3, 1, 2, 0),
    )
    return floats(batch, heads, query_len, head_dim, 1)[..., 0], key, value


def seen(query_len, key_len, causal=False, window=None):
    """The bool mask of causal and window by the documentation's definition: the last query is at the last key."""
    position = torch.arange(query_len)[:, None] + key_len - query_len
    j = torch.arange(key_len)
    mask = torch.ones(query_len, key_len, dtype=torch.bool)
    if causal:
        mask &= j <= position
    if window is not None:
        left, right = window
        mask &= (j >= position - left) if left is not None else True
        mask &= (j <= position + right) if right is not None else True
    return mask


def torch_own(bool_mask=None, scale=None):
    """PyTorch's operator. No row may be fully masked: the gradients of its formula are NaN there."""

    def attention(q, k, v, bias=None):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bool_mask if bias is None else bias, scale=scale)

    return attention


def capped_own(softcap, visible=None, scale=None):
    """PyTorch's operators in the inputs' dtype, as transformers' eager attention, with scores in float32."""

    def attention(q, k, v, bias=None):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q @ k.mT).to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias
        scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
        return torch.softmax(scores, -1).to(q.dtype) @ v

    return attention


def bool_mask(shape):
    """A mask of about a third of the keys. No row is fully masked: those have their own test."""
    mask = floats(*shape) > -0.4
    mask[..., 0] = True
    return mask
