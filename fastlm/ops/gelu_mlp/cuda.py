"""gelu_mlp by the CUDA kernels (csrc/cuda/gelu_mlp.cu) and the vendor's GEMM.

The product before the GELU, and in the backward pass the one after it, have the GELU as their epilogue.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.backends import cuda
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import on_device, precision, vector
from fastlm.core.autocast import no_autocast
from fastlm.core.layout import rows, unit_stride_matrix
from fastlm.ops.gelu_mlp.spec import Backward, Forward
from fastlm.ops.linear.spec import out_width
from fastlm.ops.linear.torch import gradients, linear


def hidden_and_activated(
    call: Forward | Backward, wants_hidden: bool, wants_activated: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The input and the output of the GELU; None where it is not wanted."""
    x, w1 = call.x, call.w1
    shape = (*x.shape[:-1], out_width(w1, call.layout))
    hidden = x.new_empty(shape) if wants_hidden else None
    activated = x.new_empty(shape) if wants_activated else None
    if x.numel():
        with on_device(x):
            device, stream = cuda.device_and_stream(x)
            cuda.kernels.gelu_mlp_forward(
                x=rows(x),
                w1=unit_stride_matrix(w1),
                b1=vector(call.b1),
                hidden=hidden,
                activated=activated,
                conv1d=call.conv1d,
                tanh=call.tanh,
                tf32=precision(x) == "tf32",
                device=device,
                stream=stream,
            )
    return hidden, activated


@no_autocast
def forward(call: Forward):
    hidden, activated = hidden_and_activated(call, call.recompute < 2, True)
    assert activated is not None
    y = linear(activated, call.w2, call.b2, call.layout)
    return y, hidden, activated if call.recompute < 1 else None


@no_autocast
def backward(call: Backward):
    dy, x, w2, hidden, activated, needed = call.dy, call.x, call.w2, call.hidden, call.activated, call.needed
    if hidden is None:
        hidden, activated = hidden_and_activated(call, True, needed[3])
        assert hidden is not None
    hidden = hidden.contiguous()  # as it was, unless a saved-tensor hook changed its layout
    recomputes = activated is None and needed[3]
    dhidden = None
    if any(needed[:3]):
        dhidden = torch.empty_like(hidden)
        if recomputes:
            activated = torch.empty_like(hidden)
        if x.numel():
            with on_device(x):
                device, stream = cuda.device_and_stream(x)
                cuda.kernels.gelu_mlp_backward(
                    dy=rows(dy),
                    w2=unit_stride_matrix(w2),
                    hidden=hidden,
                    dhidden=dhidden,
                    activated=activated if recomputes else None,
                    conv1d=call.conv1d,
                    tanh=call.tanh,
                    tf32=precision(x) == "tf32",
                    device=device,
                    stream=stream,
                )
    elif recomputes:
        activated = F.gelu(hidden, approximate=call.approximate)
    lhs = hidden if activated is None else activated  # not read where the gradient of w2 is not needed
    _, dw2, db2 = gradients(dy, lhs, w2, call.layout, (False, *needed[3:]))
    dx = dw1 = db1 = None
    if dhidden is not None:
        dx, dw1, db1 = gradients(dhidden, x, call.w1, call.layout, needed[:3])
    return dx, dw1, db1, dw2, db2


implementation = Implementation(cuda.backend, forward, backward)
