"""glu_mlp in plain PyTorch: the definition."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.activation import ACTIVATIONS
from fastlm.ops.glu_mlp.spec import Backward, Forward
from fastlm.ops.linear.reference import gradients, linear


@no_autocast
def glu_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
) -> Tensor:
    gate, up = linear(*widen(x, w_gate, b_gate), "linear"), linear(*widen(x, w_up, b_up), "linear")
    return linear(ACTIVATIONS[activation].value(gate) * up, *widen(w_down, b_down), "linear").to(x.dtype)


@no_autocast
def forward(call: Forward):
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = widen(*call[:7])
    gate, up = linear(x, w_gate, b_gate, "linear"), linear(x, w_up, b_up, "linear")
    activated = ACTIVATIONS[call.activation].value(gate) * up
    y = linear(activated, w_down, b_down, "linear")
    # What is saved is saved in x's dtype, as every backend does.
    results = narrow(call.x.dtype, y, gate, up, activated)
    return tuple(result if there else None for result, there in zip(results, call.results_present(), strict=True))


@no_autocast
def backward(call: Backward):
    g, x, w_gate, w_up, w_down, b_gate, b_up = widen(*call[:7])
    act = ACTIVATIONS[call.activation]
    if call.gate is None:
        gate, up = linear(x, w_gate, b_gate, "linear"), linear(x, w_up, b_up, "linear")
    else:
        gate, up = widen(call.gate, call.up)
    value = act.value(gate)
    activated = value * up if call.activated is None else widen(call.activated)[0]
    needs_down = call.needs_hidden, call.needed[3], call.needed[6]
    dactivated, dw_down, db_down = gradients(g, activated, w_down, "linear", needs_down)
    dx = dw_gate = dw_up = db_gate = db_up = None
    if call.needs_hidden:
        slope, dup = act.slope(gate), dactivated * value
        dgate = torch.where(slope == 0, 0, dactivated * up * slope)  # also where up is not finite, as ReLU does
        dx, dw_gate, db_gate = gradients(dgate, x, w_gate, "linear", call.needs_gate)
        more, dw_up, db_up = gradients(dup, x, w_up, "linear", call.needs_up)
        dx = dx + more if call.needed[0] else None
    return narrow(call.x.dtype, dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down)


implementation = Implementation(reference.backend, forward, backward)
