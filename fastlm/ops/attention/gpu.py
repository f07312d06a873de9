"""What triton and cuda share: results, the form of a launch, and what is too large for the kernels."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import new_like, vector
from fastlm.ops.attention.packed import boundaries
from fastlm.ops.attention.reference import row_mask_gradient
from fastlm.ops.attention.spec import Backward, Forward, Sizes, tokens_first

MAX_LENGTH = 2**30  # the kernels count positions and distances in 32 bits
MAX_HEAD_DIM = 256  # of a tile


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons, longest = [], max(sizes.query_len, sizes.key_len)
    if longest > MAX_LENGTH:
        reasons.append(f"counts up to {MAX_LENGTH} {'tokens' if sizes.packed else 'queries and keys'}, not {longest}")
    if sizes.head_dim > MAX_HEAD_DIM:
        reasons.append(f"holds heads of head_dim up to {MAX_HEAD_DIM}, not {sizes.head_dim}")
    return reasons


class Launch(NamedTuple):
    """The arguments of a launch besides query, key, value and results.

    All tensors of a launch are (batch, heads, tokens, head_dim); a packed batch is a batch of one, whose sequences the
    kernels find in cu_seqlens.
    """

    sizes: tuple[
        int, int, int, int, int, int
    ]  # batch or packed sequences, heads, num_kv_heads, queries, keys, head_dim
    mask: Tensor | None
    key_padding: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seed: Tensor | None
    scale: float
    softcap: float  # 0: none
    band: tuple[int, int]  # (lower, upper)
    dropout_p: float


def launch_of(call: Forward | Backward) -> Launch:
    query, key, cu_seqlens_q, cu_seqlens_k = call.query, call.key, call.cu_seqlens_q, call.cu_seqlens_k
    band = max(-MAX_LENGTH, min(call.lower, MAX_LENGTH)), max(-MAX_LENGTH, min(call.upper, MAX_LENGTH))
    if cu_seqlens_q is None or cu_seqlens_k is None:
        batch, heads, query_len, head_dim = query.shape
        sizes = batch, heads, key.shape[1], query_len, key.shape[2], head_dim
    else:
        (query_len, heads, head_dim), (key_len, num_kv_heads, _) = query.shape, key.shape
        sizes = cu_seqlens_q.shape[0] - 1, heads, num_kv_heads, query_len, key_len, head_dim
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    starts = cu_seqlens_q, cu_seqlens_k
    numbers = call.scale, call.softcap, band, call.dropout_p
    return Launch(sizes, call.mask, call.key_padding, *starts, call.seed, *numbers)


def as_batch(x: Tensor) -> Tensor:
    """(tokens, heads, head_dim) as a batch of one, (1, heads, tokens, head_dim)."""
    return x.transpose(0, 1)[None]


def check_boundaries(call: Forward | Backward) -> None:
    """Check the values of cu_seqlens on a CPU. On a GPU, where that would synchronise, the kernel asserts."""
    if call.query.is_cpu:
        boundaries(call)


def make_implementation(
    backend,
    launch_forward: Callable[..., None],
    launch_backward: Callable[..., None],
    readable: Callable[[Tensor], Tensor],
) -> Implementation[Forward, Backward]:
    """Attention on a GPU backend.

    launch_forward(query, key, value, out, lse, launch) fills out and lse. launch_backward(dout, dlse, query, key,
    value, out, lse, dquery, dkey, dvalue, dmask, exact, launch) fills the gradients, of which the last three may be
    None, dkey and dvalue both; `exact` asks for products that round no operand to 16 bits. lse and dlse are contiguous.
    readable(x): x, or a copy of it with strides that the kernels read.
    """

    def forward(call: Forward):
        query, key, value = call.query, call.key, call.value
        packed = call.cu_seqlens_q is not None
        if packed:
            check_boundaries(call)
        out = new_like(query) if packed else tokens_first(query)
        shape = query.shape[1::-1] if packed else tuple(query.shape[:3])
        lse = query.new_empty(shape, dtype=torch.float32)
        if query.numel() == 0 or key.numel() == 0:  # no queries, or no keys to attend to
            return out.zero_(), lse.fill_(-torch.inf)
        if packed:
            inputs = (readable(as_batch(x)) for x in (query, key, value))
            launch_forward(*inputs, as_batch(out), lse[None], launch_of(call))
        else:
            launch_forward(readable(query), readable(key), readable(value), out, lse, launch_of(call))
        return out, lse

    def backward_packed(call: Backward):
        query, key, value, out, dout, dlse = call.query, call.key, call.value, call.out, call.dout, call.dlse
        needs_dquery, needs_dkey, needs_dvalue, _ = call.needed
        check_boundaries(call)
        if query.numel() == 0 or key.numel() == 0:
            inputs = zip((query, key, value), call.needed[:3], strict=True)
            return *(torch.zeros_like(x) if need else None for x, need in inputs), None
        dquery = new_like(query)  # its kernel computes what the others need too
        dkey, dvalue = (new_like(x, needs_dkey or needs_dvalue) for x in (key, value))
        dout = torch.zeros_like(out) if dout is None else dout
        dout, query, key, value, out = (readable(as_batch(x)) for x in (dout, query, key, value, out))
        gradients = (d if d is None else as_batch(d) for d in (dquery, dkey, dvalue))
        dlse, lse = None if dlse is None else dlse.contiguous()[None], call.lse.contiguous()[None]
        launch_backward(dout, dlse, query, key, value, out, lse, *gradients, None, False, launch_of(call))
        return dquery if needs_dquery else None, dkey if needs_dkey else None, dvalue if needs_dvalue else None, None

    def backward(call: Backward):
        if call.cu_seqlens_q is not None:
            return backward_packed(call)
        query, key, value, out, mask = call.query, call.key, call.value, call.out, call.mask
        needs_dquery, needs_dkey, needs_dvalue, needs_dmask = call.needed
        dquery = tokens_first(query)  # its kernel computes what the others need too
        dkey, dvalue = (tokens_first(x, needs_dkey or needs_dvalue) for x in (key, value))
        one_per_row = needs_dmask and mask.shape[3] == 1
        dmask = mask.new_empty(mask.shape, dtype=torch.float32) if needs_dmask and not one_per_row else None
        if query.numel() == 0 or key.numel() == 0:
            dquery, dkey, dvalue, dmask = (d if d is None else d.zero_() for d in (dquery, dkey, dvalue, dmask))
        else:
            launch = launch_of(call)
            dout = torch.zeros_like(out) if call.dout is None else readable(call.dout)
            # out and lse are as they were, unless a saved-tensor hook changed their layout.
            tensors = readable(query), readable(key), readable(value), readable(out), call.lse.contiguous()
            exact = needs_dmask and query.dtype.itemsize == 2
            launch_backward(dout, vector(call.dlse), *tensors, dquery, dkey, dvalue, dmask, exact, launch)
        if one_per_row:
            dmask = row_mask_gradient(mask, call.lse, call.dlse)
        return (
            dquery if needs_dquery else None,
            dkey if needs_dkey else None,
            dvalue if needs_dvalue else None,
            dmask.to(mask.dtype) if needs_dmask else None,
        )

    return Implementation(backend, forward, backward, refuses)
