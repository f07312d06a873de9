"""gelu_mlp in plain PyTorch: the definition."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.activation import ACTIVATIONS
from fastlm.ops.gelu_mlp.spec import Backward, Forward
from fastlm.ops.linear.reference import gradients, linear

SLOPES = {"none": ACTIVATIONS["gelu"].slope, "tanh": ACTIVATIONS["gelu_tanh"].slope}


@no_autocast
def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str, layout: str
) -> Tensor:
    hidden = linear(*widen(x, w1, b1), layout)
    return linear(torch.nn.functional.gelu(hidden, approximate=approximate), *widen(w2, b2), layout).to(x.dtype)


@no_autocast
def forward(call: Forward):
    hidden = linear(*widen(call.x, call.w1, call.b1), call.layout)
    activated = torch.nn.functional.gelu(hidden, approximate=call.approximate)
    y = linear(activated, *widen(call.w2, call.b2), call.layout)
    # What is saved is saved in x's dtype, as every backend does.
    y, hidden, activated = narrow(call.x.dtype, y, hidden, activated)
    return y, hidden if call.recompute < 2 else None, activated if call.recompute < 1 else None


@no_autocast
def backward(call: Backward):
    g, wide, w1, b1, w2 = widen(call.dy, call.x, call.w1, call.b1, call.w2)
    layout, approximate = call.layout, call.approximate
    hidden = linear(wide, w1, b1, layout) if call.hidden is None else widen(call.hidden)[0]
    if call.activated is None:
        activated = torch.nn.functional.gelu(hidden, approximate=approximate)
    else:
        (activated,) = widen(call.activated)
    needs_first, needs_second = call.needed[:3], call.needed[3:]
    dactivated, dw2, db2 = gradients(g, activated, w2, layout, (any(needs_first), *needs_second))
    dx = dw1 = db1 = None
    if any(needs_first):
        dx, dw1, db1 = gradients(dactivated * SLOPES[approximate](hidden), wide, w1, layout, needs_first)
    return narrow(call.x.dtype, dx, dw1, db1, dw2, db2)


implementation = Implementation(reference.backend, forward, backward)
