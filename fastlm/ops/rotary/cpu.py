"""rotary by the C++ kernel (csrc/cpu/rotary.h)."""

from torch import Tensor

from fastlm.backends import cpu
from fastlm.backends.contract import Implementation
from fastlm.backends.cpu import kernels, new_like
from fastlm.core.layout import contiguous_last
from fastlm.ops.rotary.spec import Backward, Forward


def rotate(query: Tensor | None, key: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool):
    """The rotated tensors; None stays None."""
    results = tuple([None if x is None else new_like(x) for x in (query, key)])
    if any(x is not None and x.numel() for x in results):
        kernels.rotary(
            query=None if query is None else contiguous_last(query),
            key=None if key is None else contiguous_last(key),
            cos=contiguous_last(cos),
            sin=contiguous_last(sin),
            out_query=results[0],
            out_key=results[1],
            inverse=inverse,
            threads=cpu.threads(),
        )
    return results


def forward(call: Forward):
    return rotate(call.query, call.key, call.cos, call.sin, False)


def backward(call: Backward):
    dquery, dkey = (x if need else None for x, need in zip((call.dquery, call.dkey), call.needed, strict=True))
    return rotate(dquery, dkey, call.cos, call.sin, True)


implementation = Implementation(cpu.backend, forward, backward)
