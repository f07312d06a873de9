"""gelu_mlp in plain PyTorch: the definition."""

import math

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.gelu_mlp.spec import Backward, Forward
from fastlm.ops.linear.reference import gradients, linear


def gelu_gradient(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        t = torch.tanh(inner)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


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
        dx, dw1, db1 = gradients(dactivated * gelu_gradient(hidden, approximate), wide, w1, layout, needs_first)
    return narrow(call.x.dtype, dx, dw1, db1, dw2, db2)


implementation = Implementation(reference.backend, forward, backward)
