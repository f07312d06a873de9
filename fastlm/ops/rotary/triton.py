"""rotary by the Triton kernel (kernels/rotary.py)."""

import torch
from torch import Tensor

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import new_like, on_device
from fastlm.core.layout import contiguous_last
from fastlm.kernels import rotary as kernels
from fastlm.kernels.plan import New, Plans
from fastlm.ops.rotary.spec import Backward, Forward, Sizes

MAX_ROWS = 2**31 - 2**16  # indices of rows have 32 bits, the last tile included
MAX_HEAD_DIM = 16384  # a program holds a row in registers


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = []
    if sizes.batch * sizes.heads * sizes.tokens > MAX_ROWS:
        reasons.append(f"numbers rows in 32 bits: up to {MAX_ROWS}")
    if sizes.head_dim > MAX_HEAD_DIM:
        reasons.append(f"holds a row in registers: head_dim up to {MAX_HEAD_DIM}, not {sizes.head_dim}")
    return reasons


def rotate(x: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool):
    if x is None:
        return None
    x, out = contiguous_last(x), new_like(x)
    if out.numel():
        cos, sin = contiguous_last(cos), contiguous_last(sin)
        strides = [(0 if t.shape[0] == 1 else t.stride(0), t.stride(1)) for t in (cos, sin)]
        kernels.rotary(x, x.stride()[:3], cos, strides[0], sin, strides[1], out, inverse, x.device.index)
    return out


forwards, backwards = Plans(), Plans()


def forward(call: Forward):
    query = call.query

    def compute(new: New):
        return tuple(rotate(x, call.cos, call.sin, False) for x in (query, call.key))

    with on_device(query):
        return forwards.call(query, call[:4], (), compute)


def backward(call: Backward):
    cos, sin = call.cos, call.sin
    given = [x if need else None for x, need in zip((call.dquery, call.dkey), call.needed, strict=True)]
    like = given[1] if given[0] is None else given[0]
    if like is None:
        return None, None

    def compute(new: New):
        return tuple(rotate(x, cos, sin, True) for x in given)

    with on_device(like):
        return backwards.call(like, (*given, cos, sin), (), compute)


implementation = Implementation(triton.backend, forward, backward, refuses)
