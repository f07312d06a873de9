"""glu_mlp by the CUDA kernels (csrc/cuda/glu_mlp.cu) and the vendor's GEMM.

The product with w_up, and in the backward pass the one with w_down, have the activation as their epilogue.
"""

import torch
from torch import Tensor

from fastlm.backends import cuda
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import on_device, precision, vector
from fastlm.core.autocast import no_autocast
from fastlm.core.layout import rows, unit_stride_matrix
from fastlm.ops.activation import ACTIVATIONS, NUMBERS
from fastlm.ops.glu_mlp.spec import Backward, Forward
from fastlm.ops.linear.torch import gradients, input_gradient, linear


def hidden_and_activated(call: Forward | Backward, wants_up: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """gate x, up x (None where it is not wanted) and act(gate x) · up x."""
    x = call.x
    gate = linear(x, call.w_gate, call.b_gate, "linear")
    up, activated = torch.empty_like(gate) if wants_up else None, torch.empty_like(gate)
    if x.numel():
        with on_device(x):
            device, stream = cuda.device_and_stream(x)
            cuda.kernels.glu_mlp_forward(
                x=rows(x),
                w_up=unit_stride_matrix(call.w_up),
                b_up=vector(call.b_up),
                gate=gate,
                up=up,
                activated=activated,
                activation=NUMBERS[call.activation],
                tf32=precision(x) == "tf32",
                device=device,
                stream=stream,
            )
    return gate, up, activated


@no_autocast
def forward(call: Forward):
    saves = call.recompute < 2
    gate, up, activated = hidden_and_activated(call, saves)
    y = linear(activated, call.w_down, call.b_down, "linear")
    return y, gate if saves else None, up, activated if call.recompute < 1 else None


@no_autocast
def backward(call: Backward):
    dy, x, w_down, gate, up, activated = call.dy, call.x, call.w_down, call.gate, call.up, call.activated
    needs_activated = call.needed[3]
    if gate is None or up is None:
        gate, up, activated = hidden_and_activated(call, True)
        assert up is not None
    gate, up = gate.contiguous(), up.contiguous()  # as they were, unless a saved-tensor hook changed their layout
    recomputes = activated is None and needs_activated
    dgate = dup = None
    if call.needs_hidden:
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        if recomputes:
            activated = torch.empty_like(gate)
        if x.numel():
            with on_device(x):
                device, stream = cuda.device_and_stream(x)
                cuda.kernels.glu_mlp_backward(
                    dy=rows(dy),
                    w_down=unit_stride_matrix(w_down),
                    gate=gate,
                    up=up,
                    dgate=dgate,
                    dup=dup,
                    activated=activated if recomputes else None,
                    activation=NUMBERS[call.activation],
                    tf32=precision(x) == "tf32",
                    device=device,
                    stream=stream,
                )
    elif recomputes:
        activated = ACTIVATIONS[call.activation].value(gate).mul_(up)
    lhs = gate if activated is None else activated  # not read where the gradient of w_down is not needed
    _, dw_down, db_down = gradients(dy, lhs, w_down, "linear", (False, needs_activated, call.needed[6]))
    dx = dw_gate = dw_up = db_gate = db_up = None
    if dgate is not None and dup is not None:
        dx, dw_gate, db_gate = gradients(dgate, x, call.w_gate, "linear", call.needs_gate)
        _, dw_up, db_up = gradients(dup, x, call.w_up, "linear", (False, *call.needs_up[1:]))
        dx = dx if dx is None else input_gradient(dup, call.w_up, dx)
    return dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down


implementation = Implementation(cuda.backend, forward, backward)
