"""glu_mlp by PyTorch's matrix products and activations."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.backends import torch as native
from fastlm.backends.contract import Implementation
from fastlm.core.autocast import no_autocast
from fastlm.ops.activation import ACTIVATIONS
from fastlm.ops.glu_mlp.spec import Backward, Forward
from fastlm.ops.linear.torch import gradients, input_gradient, linear

aten = torch.ops.aten
BACKWARD: dict[str, Callable[..., Tensor]] = {
    "silu": aten.silu_backward.grad_input,
    "gelu": aten.gelu_backward.grad_input,
    "gelu_tanh": lambda *t, **out: aten.gelu_backward.grad_input(*t, approximate="tanh", **out),
    "relu": lambda *t, **out: aten.threshold_backward.grad_input(*t, 0, **out),
}


def gate_and_up(call: Forward | Backward) -> tuple[Tensor, Tensor]:
    return linear(call.x, call.w_gate, call.b_gate, "linear"), linear(call.x, call.w_up, call.b_up, "linear")


@no_autocast
def forward(call: Forward):
    gate, up = gate_and_up(call)
    activated = ACTIVATIONS[call.activation].value(gate).mul_(up)
    y = linear(activated, call.w_down, call.b_down, "linear")
    saved = zip((gate, up, activated), call.results_present()[1:], strict=True)
    return y, *(t if there else None for t, there in saved)


@no_autocast
def backward(call: Backward):
    x, activated = call.x, call.activated
    gate, up = gate_and_up(call) if call.gate is None or call.up is None else (call.gate, call.up)
    value = None
    if call.needs_hidden or (activated is None and call.needed[3]):
        value = ACTIVATIONS[call.activation].value(gate)
    if activated is None and call.needed[3]:
        assert value is not None
        activated = value * up
    lhs = gate if activated is None else activated  # not read where the gradient of w_down is not needed
    needs_down = call.needs_hidden, call.needed[3], call.needed[6]
    dactivated, dw_down, db_down = gradients(call.dy, lhs, call.w_down, "linear", needs_down)
    if dactivated is None:
        return None, None, None, dw_down, None, None, db_down
    assert value is not None
    # In place: pages of a new result would cost as much as the arithmetic.
    dup = value.mul_(dactivated)
    dactivated.mul_(up)
    dgate = BACKWARD[call.activation](dactivated, gate, grad_input=dactivated)
    dx, dw_gate, db_gate = gradients(dgate, x, call.w_gate, "linear", call.needs_gate)
    _, dw_up, db_up = gradients(dup, x, call.w_up, "linear", (False, *call.needs_up[1:]))
    if dx is not None:
        dx = input_gradient(dup, call.w_up, dx)
    return dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down


implementation = Implementation(native.backend, forward, backward)
