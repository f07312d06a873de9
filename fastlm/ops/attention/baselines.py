"""What the benchmark of attention compares it with: PyTorch's kernels for it, and flash-attn where it is installed.

Whether one supports a call is found out when it is called.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlm.ops.benchmark import Function


def has_16_bit_kernels(device: str, dtype: torch.dtype) -> bool:
    return device == "cuda" and dtype != torch.float32


def installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # not installed, or built for another PyTorch
        return None


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


# Dense: query, key, value are (batch, heads, tokens, head_dim)


def sdpa(causal: bool, dropout_p: float = 0.0, kind: SDPBackend | None = None) -> Function:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout_p)
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout_p)

    return call


def band(tokens: int, window: int, device: str) -> Tensor:
    """Whether a query attends to a key: to the last `window` ones, its own included."""
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return (distance >= 0) & (distance < window)


def masked(mask: Tensor) -> Function:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(mask: Callable[..., Tensor] | None, tokens: int, device: str, compiled: bool = True) -> Function:
    """FlexAttention; mask(batch, head, query, key): whether the query attends to the key."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @functools.cache
    def prepared() -> tuple:
        blocks = None if mask is None else create_block_mask(mask, None, None, tokens, tokens, device=device)
        return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention, blocks

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function, blocks = prepared()
        return function(q, k, v, block_mask=blocks)

    return call


def causal_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def dense(device: str, dtype: torch.dtype, causal: bool, dropout_p: float = 0.0) -> dict[str, Function]:
    found = {"eager": sdpa(causal, dropout_p)}
    if not has_16_bit_kernels(device, dtype):
        return found
    found["sdpa flash"] = sdpa(causal, dropout_p, SDPBackend.FLASH_ATTENTION)
    found["sdpa cudnn"] = sdpa(causal, dropout_p, SDPBackend.CUDNN_ATTENTION)
    if flash := installed("flash_attn"):
        found["flash-attn"] = lambda q, k, v: flash.flash_attn_func(
            *tokens_first(q, k, v), dropout_p=dropout_p, causal=causal
        ).transpose(1, 2)
    return found


def decode(device: str, dtype: torch.dtype) -> dict[str, Function]:
    """Of one query and the keys and values of a cache."""
    found = dense(device, dtype, causal=False)
    if "flash-attn" in found and (flash := installed("flash_attn")):
        found["flash-attn"] = lambda q, k, v: flash.flash_attn_with_kvcache(*tokens_first(q, k, v)).transpose(1, 2)
    return found


# Packed: query, key, value are (tokens, heads, head_dim)


def by_sequence(lengths: Sequence[int], causal: bool) -> Function:
    """One sequence at a time, which on a CPU is faster than padding them."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for one in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
            query, key, value = (x.transpose(0, 1)[None] for x in one)
            outs.append(F.scaled_dot_product_attention(query, key, value, is_causal=causal)[0].transpose(0, 1))
        return torch.cat(outs)

    return call


def padded(lengths: Sequence[int], causal: bool, device: str) -> Function:
    """Scattered into a padded batch, and gathered from it."""
    batch, longest = len(lengths), max(lengths)
    places = torch.cat([torch.arange(length) + i * longest for i, length in enumerate(lengths)]).to(device)

    def pad(x: Tensor) -> Tensor:
        rows = x.new_zeros(batch * longest, *x.shape[1:]).index_copy(0, places, x)
        return rows.unflatten(0, (batch, longest)).transpose(1, 2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None  # the padding comes last, so no causal query attends to it
        if not causal:
            mask = torch.zeros(batch * longest, dtype=torch.bool, device=device).index_fill(0, places, True)
            mask = mask.view(batch, 1, 1, longest)
        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask, is_causal=causal)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, places)

    return call


def nested(lengths: Sequence[int], cu_seqlens: Tensor, causal: bool) -> Function:
    offsets, shortest, longest = cu_seqlens.long(), min(lengths), max(lengths)

    def nest(x: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=shortest, max_seqlen=longest)
        return nested.transpose(1, 2)

    def call(*tensors: Tensor) -> Tensor:
        q, k, v = map(nest, tensors)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).values()

    return call


def flex_packed(lengths: Sequence[int], causal: bool, device: str, compiled: bool = True) -> Function:
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = sequence[query] == sequence[key]
        return same & (key <= query) if causal else same

    call = flex(mask, sum(lengths), device, compiled)
    return lambda q, k, v: call(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)


def packed(
    device: str, dtype: torch.dtype, lengths: Sequence[int], cu_seqlens: Tensor, causal: bool
) -> dict[str, Function]:
    found = {"eager": by_sequence(lengths, causal)}
    if device != "cpu":
        found["sdpa padded"] = padded(lengths, causal, device)
        found["sdpa nested"] = nested(lengths, cu_seqlens, causal)
    if not has_16_bit_kernels(device, dtype):
        return found
    both, longest = (cu_seqlens, cu_seqlens), (max(lengths), max(lengths))
    if varlen := installed("torch.nn.attention.varlen"):
        window = (-1, 0 if causal else -1)
        found["torch varlen"] = lambda q, k, v: varlen.varlen_attn(q, k, v, *both, *longest, window_size=window)
    if flash := installed("flash_attn"):
        found["flash-attn"] = lambda q, k, v: flash.flash_attn_varlen_func(q, k, v, *both, *longest, causal=causal)
    return found
