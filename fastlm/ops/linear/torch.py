"""linear by PyTorch's matrix products."""

import torch
from torch import Tensor

from fastlm.backends import torch as native
from fastlm.backends.contract import Implementation
from fastlm.core.autocast import no_autocast
from fastlm.ops.linear.spec import Backward, Forward


def flat_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    if layout == "linear":
        return torch.nn.functional.linear(x, weight, bias).contiguous()
    flat = flat_rows(x)
    y = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def gradients(dy: Tensor, x: Tensor, weight: Tensor, layout: str, needed: tuple[bool, ...]):
    """Of x, weight and bias; None where not needed."""
    needs_dx, needs_dweight, needs_dbias = needed
    flat, flat_dy = flat_rows(x), flat_rows(dy)
    dx = torch.mm(flat_dy, weight if layout == "linear" else weight.t()).view(x.shape) if needs_dx else None
    dweight = None
    if needs_dweight:
        dweight = torch.mm(flat_dy.t(), flat) if layout == "linear" else torch.mm(flat.t(), flat_dy)
    return dx, dweight, flat_dy.sum(0) if needs_dbias else None


def input_gradient(dy: Tensor, weight: Tensor, dx: Tensor) -> Tensor:
    """dx + dy W, for a weight as nn.Linear stores it, in place: the gradient of an input of several layers."""
    flat_rows(dx).addmm_(flat_rows(dy), weight)
    return dx


def composite(call: Forward) -> Tensor:
    return linear(*call)


@no_autocast
def forward(call: Forward):
    return (linear(*call),)


@no_autocast
def backward(call: Backward):
    return gradients(call.dy, call.x, call.weight, call.layout, call.needed)


implementation = Implementation(native.backend, forward, backward, composite=composite)
