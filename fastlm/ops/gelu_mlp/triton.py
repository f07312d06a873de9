"""gelu_mlp by the Triton kernels (kernels/gelu_mlp.py) and the vendor's GEMM."""

import torch

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import in_out_strides, num_processors, on_device, precision, vector
from fastlm.backends.triton import architecture
from fastlm.core.autocast import no_autocast
from fastlm.core.layout import as_rows
from fastlm.kernels import gelu_mlp as kernels
from fastlm.kernels.mlp_tiles import fused_tile
from fastlm.ops.gelu_mlp.spec import Backward, Forward
from fastlm.ops.linear.torch import gradients, linear


@no_autocast
def forward(call: Forward):
    x, w1, b1, layout = call.x, call.w1, call.b1, call.layout
    device = x.device.index
    tile = fused_tile(architecture(device), x.dtype.itemsize)
    shape, saves_hidden = call.hidden_shape, call.recompute < 2
    if x.numel() == 0:
        hidden, activated = x.new_empty(shape), x.new_empty(shape)
    elif tile is not None:
        hidden, activated = x.new_empty(shape) if saves_hidden else None, x.new_empty(shape)
        with on_device(x):
            kernels.gelu_mlp_forward(
                as_rows(x),
                w1,
                in_out_strides(w1, layout),
                vector(b1),
                hidden,
                activated,
                shape[-1],
                call.tanh,
                precision(x),
                tile,
                device,
                num_processors(device),
            )
    else:
        hidden = linear(x, w1, call.b1, layout)
        activated = torch.empty_like(hidden) if saves_hidden else hidden
        with on_device(x):
            kernels.gelu_mlp_activate(hidden, activated, call.tanh, device)
    y = linear(activated, call.w2, call.b2, layout)
    return y, hidden if saves_hidden else None, activated if call.recompute < 1 else None


@no_autocast
def backward(call: Backward):
    dy, x, w1, w2, hidden, activated = call.dy, call.x, call.w1, call.w2, call.hidden, call.activated
    layout, device, needed = call.layout, call.x.device.index, call.needed
    tile = fused_tile(architecture(device), x.dtype.itemsize)
    if hidden is None:
        hidden = linear(x, w1, call.b1, layout)
    hidden = hidden.contiguous()  # as it was, unless a saved-tensor hook changed its layout
    recomputes = activated is None and needed[3]
    activated = torch.empty_like(hidden) if recomputes else activated
    written = activated if recomputes else None
    dhidden = None
    if x.numel() == 0:
        dhidden = hidden
    elif any(needed[:3]) and tile is not None:
        dhidden = torch.empty_like(hidden)
        with on_device(x):
            kernels.gelu_mlp_backward(
                as_rows(dy),
                w2,
                in_out_strides(w2, layout)[::-1],
                hidden,
                dhidden,
                written,
                hidden.shape[-1],
                call.tanh,
                precision(x),
                tile,
                device,
                num_processors(device),
            )
    elif any(needed[:3]):
        dhidden = gradients(dy, hidden, w2, layout, (True, False, False))[0]
        with on_device(x):
            kernels.gelu_mlp_slope(dhidden, hidden, written, call.tanh, device)
    elif recomputes:
        with on_device(x):
            kernels.gelu_mlp_activate(hidden, activated, call.tanh, device)
    lhs = hidden if activated is None else activated  # not read where the gradient of w2 is not needed
    _, dw2, db2 = gradients(dy, lhs, w2, layout, (False, *needed[3:]))
    dx = dw1 = db1 = None
    if dhidden is not None:
        dx, dw1, db1 = gradients(dhidden, x, w1, layout, needed[:3])
    return dx, dw1, db1, dw2, db2


implementation = Implementation(triton.backend, forward, backward)
