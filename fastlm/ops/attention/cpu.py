"""attention by the C++ kernel (csrc/cpu/attention.h, csrc/cpu/attention_backward.h)."""

import torch
from torch import Tensor

from fastlm.backends import cpu
from fastlm.backends.contract import Implementation
from fastlm.backends.cpu import kernels, new, new_like, seed_value
from fastlm.core.huge_pages import on_huge_pages
from fastlm.core.layout import contiguous_last
from fastlm.ops.attention.packed import boundaries
from fastlm.ops.attention.reference import row_mask_gradient
from fastlm.ops.attention.spec import Backward, Forward

DENSE: tuple[list[int], list[int]] = [], []  # boundaries of a batch that is not packed


def new_result(x: Tensor, packed: bool) -> Tensor:
    """An uninitialised result like x. A dense one, (B, H, T, D), is stored as (B, T, H, D): merging heads is a view."""
    if packed:
        return new_like(x)
    return on_huge_pages(torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device))


def forward(call: Forward):
    query, key = call.query, call.key
    packed = call.cu_seqlens_q is not None
    query_starts, key_starts = boundaries(call) if packed else DENSE
    out = new_result(query, packed)
    lse = new(query, query.shape[1::-1] if packed else query.shape[:3], dtype=torch.float32)
    if query.numel() == 0 or key.numel() == 0:  # no queries, or no keys to attend to
        return out.zero_(), lse.fill_(-torch.inf)
    kernels.attention_forward(
        query=contiguous_last(query),
        key=contiguous_last(key),
        value=contiguous_last(call.value),
        out=out,
        lse=lse,
        mask=call.mask,
        key_padding=call.key_padding,
        query_starts=query_starts,
        key_starts=key_starts,
        scale=call.scale,
        softcap=call.softcap,
        lower=call.lower,
        upper=call.upper,
        dropout_p=call.dropout_p,
        seed=seed_value(call.seed),
        threads=cpu.threads(),
    )
    return out, lse


def backward(call: Backward):
    query, key, value, mask, lse = call.query, call.key, call.value, call.mask, call.lse
    needs_dquery, needs_dkey, needs_dvalue, needs_dmask = call.needed
    packed = call.cu_seqlens_q is not None
    query_starts, key_starts = boundaries(call) if packed else DENSE
    # The kernel makes the three gradients together; what is not needed is dropped.
    dquery, dkey, dvalue = new_result(query, packed), new_result(key, packed), new_result(value, packed)
    one_per_row = needs_dmask and mask.shape[3] == 1
    dmask = mask.new_zeros(mask.shape, dtype=torch.float32) if needs_dmask and not one_per_row else None
    if query.numel() == 0 or key.numel() == 0:
        dquery.zero_(), dkey.zero_(), dvalue.zero_()
    else:
        kernels.attention_backward(
            dout=torch.zeros_like(call.out) if call.dout is None else contiguous_last(call.dout),
            dlse=call.dlse if call.dlse is None else call.dlse.contiguous(),
            query=contiguous_last(query),
            key=contiguous_last(key),
            value=contiguous_last(value),
            out=contiguous_last(call.out),  # as it was, unless a saved-tensor hook changed its layout
            lse=lse,
            mask=mask,
            key_padding=call.key_padding,
            dquery=dquery,
            dkey=dkey,
            dvalue=dvalue,
            dmask=dmask,
            query_starts=query_starts,
            key_starts=key_starts,
            scale=call.scale,
            softcap=call.softcap,
            lower=call.lower,
            upper=call.upper,
            dropout_p=call.dropout_p,
            seed=seed_value(call.seed),
            threads=cpu.threads(),
        )
    if needs_dmask:
        dmask = row_mask_gradient(mask, lse, call.dlse) if one_per_row else dmask.to(mask.dtype)
    return (
        dquery if needs_dquery else None,
        dkey if needs_dkey else None,
        dvalue if needs_dvalue else None,
        dmask,
    )


implementation = Implementation(cpu.backend, forward, backward)
