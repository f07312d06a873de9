"""glu_mlp by the Triton kernels (kernels/glu_mlp.py) and the vendor's GEMM."""

from typing import Any

import torch
from torch import Tensor

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import in_out_strides, num_processors, on_device, precision, vector
from fastlm.backends.triton import architecture
from fastlm.core.autocast import no_autocast
from fastlm.core.layout import as_rows
from fastlm.kernels import glu_mlp as kernels
from fastlm.kernels.mlp_tiles import fused_tile
from fastlm.ops.glu_mlp.spec import Backward, Forward
from fastlm.ops.linear.torch import gradients, input_gradient, linear


def fused_settings(call: Forward | Backward) -> dict[str, Any] | None:
    """Of the kernels that are fused into products; None to use the vendor's product and a pointwise kernel."""
    x, device = call.x, call.x.device.index
    tile = fused_tile(architecture(device), x.dtype.itemsize)
    if tile is None:
        return None
    common = {"precision": precision(x), "device": device, "num_processors": num_processors(device)}
    return {"activation": call.activation, "tile": tile, **common}


def hidden_and_activated(call: Forward | Backward, wants_hidden: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """gate x and up x, None where they are not wanted and need no memory, and act(gate x) · up x."""
    x, w_gate, w_up, shape = call.x, call.w_gate, call.w_up, call.hidden_shape
    b_gate, b_up, settings = vector(call.b_gate), vector(call.b_up), fused_settings(call)
    gate = up = None
    if x.numel() == 0:
        return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)
    if settings is not None:
        if wants_hidden:
            gate, up = x.new_empty(shape), x.new_empty(shape)
        activated = x.new_empty(shape)
        weights = w_gate, in_out_strides(w_gate, "linear"), w_up, in_out_strides(w_up, "linear")
        with on_device(x):
            kernels.glu_mlp_forward(as_rows(x), *weights, b_gate, b_up, gate, up, activated, shape[-1], **settings)
        return gate, up, activated
    gate, up = linear(x, w_gate, call.b_gate, "linear"), linear(x, w_up, call.b_up, "linear")
    activated = torch.empty_like(gate) if wants_hidden else gate
    with on_device(x):
        kernels.glu_mlp_activate(gate, up, activated, call.activation, x.device.index)
    return gate, up, activated


@no_autocast
def forward(call: Forward):
    saves = call.recompute < 2
    gate, up, activated = hidden_and_activated(call, saves)
    y = linear(activated, call.w_down, call.b_down, "linear")
    return y, gate if saves else None, up if saves else None, activated if call.recompute < 1 else None


@no_autocast
def backward(call: Backward):
    dy, x, w_down, gate, up, activated = call.dy, call.x, call.w_down, call.gate, call.up, call.activated
    device, needs_activated = x.device.index, call.needed[3]
    if gate is None or up is None:
        gate, up, activated = hidden_and_activated(call, True)
        assert gate is not None and up is not None
    gate, up = gate.contiguous(), up.contiguous()  # as they were, unless a saved-tensor hook changed their layout
    recomputes = activated is None and needs_activated
    activated = torch.empty_like(gate) if recomputes else activated
    written = activated if recomputes else None
    settings = fused_settings(call)
    dgate = dup = None
    if x.numel() == 0:
        dgate, dup = gate, up
    elif call.needs_hidden and settings is not None:
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        strides = in_out_strides(w_down, "linear")[::-1]
        with on_device(x):
            kernels.glu_mlp_backward(
                as_rows(dy), w_down, strides, gate, up, dgate, dup, written, gate.shape[-1], **settings
            )
    elif call.needs_hidden:
        dgate, dup = gradients(dy, gate, w_down, "linear", (True, False, False))[0], torch.empty_like(up)
        with on_device(x):
            kernels.glu_mlp_slope(dgate, gate, up, dup, written, call.activation, device)
    elif recomputes:
        with on_device(x):
            kernels.glu_mlp_activate(gate, up, activated, call.activation, device)
    lhs = gate if activated is None else activated  # not read where the gradient of w_down is not needed
    _, dw_down, db_down = gradients(dy, lhs, w_down, "linear", (False, needs_activated, call.needed[6]))
    dx = dw_gate = dw_up = db_gate = db_up = None
    if dgate is not None:
        dx, dw_gate, db_gate = gradients(dgate, x, call.w_gate, "linear", call.needs_gate)
        _, dw_up, db_up = gradients(dup, x, call.w_up, "linear", (False, *call.needs_up[1:]))
        dx = dx if dx is None else input_gradient(dup, call.w_up, dx)
    return dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down


implementation = Implementation(triton.backend, forward, backward)
