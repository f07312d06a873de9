"""What others have for a case on a GPU: PyTorch eager, compiled, by each of its kernels, and flash-attn where it is installed. They take what ours takes.

Whether one serves is found out when it is called. Compiled ones are left out where compiled is false: each takes seconds before its first result.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Function = Callable[..., Any]


def eager_and_compiled(function: Function, compiled: bool, name: str = "eager") -> dict[str, Function]:
    return {name: function} | ({"compiled": torch.compile(function, dynamic=False)} if compiled else {})


def fast(device: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels of 16-bit numbers to choose from."""
    return device == "cuda" and dtype != torch.float32


def installed(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # not there, or built for another PyTorch
        return None


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, kind: SDPBackend | None = None) -> Tensor:
    if kind is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def sdpas(device: str, dtype: torch.dtype, causal: bool, compiled: bool) -> dict[str, Function]:
    """PyTorch's own, as it chooses and each of its fast ones."""
    found = eager_and_compiled(functools.partial(sdpa, causal=causal), compiled, "sdpa")
    if fast(device, dtype):
        for name, kind in (("sdpa flash", SDPBackend.FLASH_ATTENTION), ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION)):
            found[name] = functools.partial(sdpa, causal=causal, kind=kind)
    return found


def flex(mask: Callable[..., Tensor] | None, tokens: int, device: str, compiled: bool) -> Function:
    """PyTorch's compiler's own attention; mask(batch, head, query, key): whether it sees. q, k, v: (batch, heads, tokens, head_dim)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = None if mask is None else create_block_mask(mask, None, None, tokens, tokens, device=device)
    call = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    return lambda q, k, v: call(q, k, v, block_mask=blocks)


def causal_mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def attention(device: str, dtype: torch.dtype, tokens: int, causal: bool, compiled: bool) -> dict[str, Function]:
    """Of q, k, v (batch, heads, tokens, head_dim)."""
    found = sdpas(device, dtype, causal, compiled)
    if compiled:
        found["flex compiled"] = flex(causal_mask if causal else None, tokens, device, True)
    flash = installed("flash_attn") if fast(device, dtype) else None
    if flash:
        found["flash-attn"] = lambda q, k, v: flash.flash_attn_func(*tokens_first(q, k, v), causal=causal).transpose(
            1, 2
        )
    return found


def decode(device: str, dtype: torch.dtype, compiled: bool) -> dict[str, Function]:
    """Of one query (batch, heads, 1, head_dim) and the cache's keys and values (batch, heads, tokens, head_dim)."""
    found = sdpas(device, dtype, False, compiled)
    flash = installed("flash_attn") if fast(device, dtype) else None
    if flash:
        found["flash-attn"] = lambda q, k, v: flash.flash_attn_with_kvcache(*tokens_first(q, k, v)).transpose(1, 2)
    return found


def by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool) -> Tensor:
    outs = []
    for one in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        query, key, value = (x.transpose(0, 1)[None] for x in one)
        outs.append(F.scaled_dot_product_attention(query, key, value, is_causal=causal)[0].transpose(0, 1))
    return torch.cat(outs)


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], places: Tensor, causal: bool) -> Tensor:
    """places (tokens,): of each token in the batch (sequences · longest, …). What pads comes last, so that a causal query never sees any."""
    batch, longest = len(lengths), max(lengths)

    def grid(x: Tensor) -> Tensor:
        return (
            x.new_zeros(batch * longest, *x.shape[1:])
            .index_copy(0, places, x)
            .unflatten(0, (batch, longest))
            .transpose(1, 2)
        )

    real = (
        torch.zeros(batch * longest, dtype=torch.bool, device=q.device)
        .index_fill(0, places, True)
        .view(batch, 1, 1, longest)
    )
    out = F.scaled_dot_product_attention(
        grid(q), grid(k), grid(v), attn_mask=None if causal else real, is_causal=causal
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, places)


def nested(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, lengths: Sequence[int], causal: bool) -> Tensor:
    shortest, longest = min(lengths), max(lengths)
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x, cu_seqlens, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)
        for x in (q, k, v)
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).values()


def attention_varlen(
    device: str,
    dtype: torch.dtype,
    lengths: Sequence[int],
    cu_seqlens: Tensor,
    places: Tensor,
    causal: bool,
    compiled: bool,
) -> dict[str, Function]:
    """Of q, k, v (tokens, heads, head_dim); cu_seqlens (sequences + 1,) in int32."""
    found: dict[str, Function] = {
        "sdpa by sequence": functools.partial(by_sequence, lengths=lengths, causal=causal),
        "sdpa padded": functools.partial(padded, lengths=lengths, places=places, causal=causal),
        "sdpa nested": functools.partial(nested, cu_seqlens=cu_seqlens.long(), lengths=lengths, causal=causal),
    }
    if compiled:
        found["flex compiled"] = flex_varlen(lengths, device, causal, True)
    both, longest = (cu_seqlens, cu_seqlens), (max(lengths), max(lengths))
    torchs, flash = (
        installed(name) if fast(device, dtype) else None for name in ("torch.nn.attention.varlen", "flash_attn")
    )
    if torchs:
        window = (-1, 0) if causal else (-1, -1)
        found["torch varlen"] = lambda q, k, v: torchs.varlen_attn(q, k, v, *both, *longest, window_size=window)
    if flash:
        found["flash-attn"] = lambda q, k, v: flash.flash_attn_varlen_func(q, k, v, *both, *longest, causal=causal)
    return found


def flex_varlen(lengths: Sequence[int], device: str, causal: bool, compiled: bool) -> Function:
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = sequence[query] == sequence[key]
        return same & (key <= query) if causal else same

    call = flex(mask, sum(lengths), device, compiled)
    return lambda q, k, v: call(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)
