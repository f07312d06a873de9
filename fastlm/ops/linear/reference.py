"""linear in plain PyTorch: the definition."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.linear.spec import Backward, Forward


def in_by_out(weight: Tensor, layout: str) -> Tensor:
    """The weight as (in, out), however it is stored."""
    return weight.t() if layout == "linear" else weight


@no_autocast
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    wide, w, b = widen(x, weight, bias)
    y = wide @ in_by_out(w, layout)
    return (y if b is None else y + b).to(x.dtype)


def gradients(dy: Tensor, x: Tensor, weight: Tensor, layout: str, needed: tuple[bool, ...]):
    """Of x, weight and bias, in x's dtype; None where not needed."""
    needs_dx, needs_dweight, needs_dbias = needed
    g, wide, w = widen(dy, x, weight)
    flat, flat_g = wide.reshape(-1, x.shape[-1]), g.reshape(-1, dy.shape[-1])
    dx = g @ in_by_out(w, layout).t() if needs_dx else None
    dweight = None
    if needs_dweight:
        dweight = flat_g.t() @ flat if layout == "linear" else flat.t() @ flat_g
    dbias = flat_g.sum(0) if needs_dbias else None
    return narrow(x.dtype, dx, dweight, dbias)


def forward(call: Forward):
    return (linear(call.x, call.weight, call.bias, call.layout).contiguous(),)


@no_autocast
def backward(call: Backward) -> tuple[torch.Tensor | None, ...]:
    return gradients(call.dy, call.x, call.weight, call.layout, call.needed)


implementation = Implementation(reference.backend, forward, backward)
