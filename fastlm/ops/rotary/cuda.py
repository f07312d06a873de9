"""rotary by the CUDA kernel (csrc/cuda/rotary.cu)."""

from torch import Tensor

from fastlm.backends import cuda
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import new_like, on_device
from fastlm.core.layout import contiguous_last
from fastlm.ops.rotary.spec import Backward, Forward


def rotate(x: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool):
    if x is None:
        return None
    x, out = contiguous_last(x), new_like(x)
    if out.numel():
        with on_device(x):
            device, stream = cuda.device_and_stream(x)
            cuda.kernels.rotary(
                x=x,
                cos=contiguous_last(cos),
                sin=contiguous_last(sin),
                out=out,
                inverse=inverse,
                device=device,
                stream=stream,
            )
    return out


def forward(call: Forward):
    return tuple(rotate(x, call.cos, call.sin, False) for x in (call.query, call.key))


def backward(call: Backward):
    return tuple(
        rotate(x if need else None, call.cos, call.sin, True)
        for x, need in zip((call.dquery, call.dkey), call.needed, strict=True)
    )


implementation = Implementation(cuda.backend, forward, backward)
