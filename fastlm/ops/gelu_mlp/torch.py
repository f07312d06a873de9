"""gelu_mlp by PyTorch's matrix products and GELU."""

import torch

from fastlm.backends import torch as native
from fastlm.backends.contract import Implementation
from fastlm.core.autocast import no_autocast
from fastlm.ops.gelu_mlp.spec import Backward, Forward
from fastlm.ops.linear.torch import gradients, linear

aten = torch.ops.aten


@no_autocast
def forward(call: Forward):
    hidden = linear(call.x, call.w1, call.b1, call.layout)
    activated = torch.nn.functional.gelu(hidden, approximate=call.approximate)
    y = linear(activated, call.w2, call.b2, call.layout)
    return y, hidden if call.recompute < 2 else None, activated if call.recompute < 1 else None


@no_autocast
def backward(call: Backward):
    hidden, activated, layout = call.hidden, call.activated, call.layout
    needs_first, needs_second = call.needed[:3], call.needed[3:]
    if hidden is None:
        hidden = linear(call.x, call.w1, call.b1, layout)
    if activated is None and needs_second[0]:
        activated = torch.nn.functional.gelu(hidden, approximate=call.approximate)
    lhs = hidden if activated is None else activated  # not read where the gradient of w2 is not needed
    dactivated, dw2, db2 = gradients(call.dy, lhs, call.w2, layout, (any(needs_first), *needs_second))
    if dactivated is None:
        return None, None, None, dw2, db2
    # In place: pages of a new result would cost as much as the arithmetic.
    dhidden = aten.gelu_backward.grad_input(dactivated, hidden, approximate=call.approximate, grad_input=dactivated)
    return *gradients(dhidden, call.x, call.w1, layout, needs_first), dw2, db2


implementation = Implementation(native.backend, forward, backward)
