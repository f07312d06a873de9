"""attention by PyTorch's flash attention on a CPU and by its scaled_dot_product_attention elsewhere."""

import math

import torch
from torch import Tensor

from fastlm.backends import torch as native
from fastlm.backends.contract import Implementation
from fastlm.core.autocast import no_autocast
from fastlm.ops.attention import packed, reference
from fastlm.ops.attention.reference import band_mask
from fastlm.ops.attention.spec import Backward, Forward, Sizes

aten = torch.ops.aten
NATIVE_GQA = torch.__version__ >= "2.13"  # its CPU kernel was checked to read grouped heads in place from here on


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = [native.OTHER_DROPOUT] if sizes.dropout else []
    if sizes.softcap:
        reasons.append("has no cap of the scores")
    if sizes.return_lse:
        reasons.append("has no log-sum-exp of a fully masked row, and no gradient of any")
    if sizes.mask_gradient:
        reasons.append("gives no gradient of the mask")
    if device.type != "cpu" and sizes.masked:
        reasons.append(f"lets a masked NaN reach the result on {device.type}")
    return reasons


def unit_stride_last(*tensors: Tensor | None):
    """PyTorch's kernel reads its last dimension as contiguous without checking."""
    return (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors)


def kv_heads_for_native(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with as many heads as this PyTorch's kernel needs."""
    groups = 1 if NATIVE_GQA else query.shape[1] // key.shape[1]
    return reference.repeat_kv_heads(key, groups), reference.repeat_kv_heads(value, groups)


def additive_mask(call: Forward | Backward) -> tuple[Tensor | None, bool]:
    """(additive mask or None, is_causal) for PyTorch, whose causal mask is aligned top-left."""
    query, key, mask = call.query, call.key, call.mask
    # It masks scores before it scales them: a scale of 0 or less would turn −inf into NaN or +inf.
    causal = call.upper == 0 and call.lower <= 1 - query.shape[2] and call.scale > 0
    masks = [] if causal else [band_mask(query, key, call.lower, call.upper)]
    masks.append(None if call.key_padding is None else call.key_padding[:, None, None, :])
    bias = None
    if mask is not None:
        if mask.dtype == torch.bool:
            masks.append(mask)
        else:
            bias = mask
    given = [each for each in masks if each is not None]
    if given:
        allowed = given[0]
        for more in given[1:]:
            allowed = allowed & more
        bias = query.new_zeros(()) if bias is None else bias
        bias = torch.where(allowed, bias, -torch.inf)
        bias = bias if bias.dim() == 4 else bias[None, None]
    return bias, causal


def has_non_finite(query: Tensor, key: Tensor, value: Tensor, masked: bool) -> bool:
    """Whether a NaN or Inf makes PyTorch's result differ from ours: in query or key, or in value where that is masked.

    PyTorch gives 0 for a row whose scores are all NaN.
    """
    dtype = torch.float32 if query.dtype == torch.float16 else query.dtype  # a float16 sum would overflow
    # Over heads and dimensions first: one sum over everything takes PyTorch four times as long.
    return not all(
        math.isfinite(x.transpose(1, 2).sum((2, 3), dtype=dtype).sum().item())
        for x in ((query, key, value) if masked else (query, key))
    )


def tokens_first(x: Tensor) -> Tensor:
    """As reference.tokens_first, where PyTorch stored the result otherwise."""
    return x if x.transpose(1, 2).is_contiguous() else reference.tokens_first(x, x.dtype)


@no_autocast
def forward_dense(call: Forward, first: int = 0):
    query, key, value = call.query, call.key, call.value
    on_cpu = query.device.type == "cpu"
    bias, causal = additive_mask(call)
    empty = query.numel() == 0 or key.numel() == 0
    if empty or (on_cpu and has_non_finite(query, key, value, bias is not None or causal)):
        return reference.forward_dense(call)
    if on_cpu:
        query, key, value = unit_stride_last(query, *kv_heads_for_native(query, key, value))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=call.scale
        )
        return tokens_first(out), lse.contiguous()
    grouped = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=call.scale, enable_gqa=grouped)
    return tokens_first(out), query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


@no_autocast
def backward_dense(call: Backward, first: int = 0):
    query, key, value, lse = call.query, call.key, call.value, call.lse
    bias, causal = additive_mask(call)
    empty = query.numel() == 0 or key.numel() == 0
    if empty or query.device.type != "cpu" or has_non_finite(query, key, value, bias is not None or causal):
        return reference.backward_dense(call)
    num_kv_heads = key.shape[1]
    query, key, value, dout = unit_stride_last(query, *kv_heads_for_native(query, key, value), call.dout)
    dquery, dkey, dvalue = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, query, key, value, call.out, lse, 0.0, causal, attn_mask=bias, scale=call.scale
    )
    if key.shape[1] != num_kv_heads:
        dkey, dvalue = (d.unflatten(1, (num_kv_heads, -1)).sum(2) for d in (dkey, dvalue))
    gradients = zip((dquery, dkey, dvalue), call.needed[:3], strict=True)
    return *(tokens_first(d) if need else None for d, need in gradients), None


def forward(call: Forward):
    return forward_dense(call) if call.cu_seqlens_q is None else packed.forward(call, forward_dense)


def backward(call: Backward):
    return backward_dense(call) if call.cu_seqlens_q is None else packed.backward(call, backward_dense)


implementation = Implementation(native.backend, forward, backward, refuses)
