"""y = x W + b: the projections around attention, in the layout of nn.Linear or of GPT-2's Conv1D."""

import functools
import math
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastlm import backends
from fastlm.backends import reference
from fastlm.backends import torch as native
from fastlm.ops import autocast
from fastlm.ops.boundary import (
    autocasts,
    check_choice,
    check_like,
    check_rows,
    check_vector,
    lowered,
    mismatch,
    opaque,
    present,
)

LAYOUTS = ("linear", "conv1d")

# 1. The function people call


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, layout: str = "linear", backend: str | None = None
) -> Tensor:
    """Multiply the last dimension of x by a weight matrix, and add a bias.

    Args:
        x: (..., in), floating point, any strides. Under autocast x, weight and bias are cast as for `torch.nn.functional.linear`.
        weight: (out, in) with layout="linear" (torch.nn.Linear), (in, out) with layout="conv1d" (GPT-2's Conv1D); dtype and device of x.
        bias: (out,) or None; dtype and device of x.
        layout: how the weight is stored; no layout is ever transposed in memory.
        backend: force one backend by name; None takes the first that can (see fastlm.info()).

    Returns:
        (..., out), contiguous, in x's dtype; sums are accumulated in float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or layout that does not fit; the message names the argument.
        fastlm.Unsupported: no backend, or not the forced one, can serve this call; the message lists why.
    """
    originals: tuple = ()
    if autocasts(x):
        if x.is_cuda:
            x, weight, bias = lowered(x, weight, bias)
        else:
            x, originals, weight, bias = autocast.lowered_for(x, weight, bias)
    check_rows(x)
    check_choice("layout", layout, LAYOUTS)
    out_width = check_weight("weight", weight, x.shape[-1], layout, "the last dimension of x")
    check_like("weight", weight, x)
    if bias is not None:
        check_vector("bias", bias, out_width, "the output width of weight")
        check_like("bias", bias, x)

    backend = (
        backends.requested(backend) if opaque(x, weight, bias) else serving(x, weight, layout, backend)
    )  # once: the backward uses the same
    if hasattr(backend, "LINEAR_IS_PYTORCHS") and not originals:
        return native.linear(
            x, weight, bias, layout
        )  # with PyTorch's own gradients: a node of ours around them costs the host more than a launch
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *originals)):
        return Linear.apply(x, weight, bias, layout, backend, *originals)
    return linear_forward(x, weight, bias, layout, backend)


def check_weight(argument: str, weight: Tensor, in_width: int, layout: str, why: str) -> int:
    """The output width of a weight matrix that takes in_width."""
    if weight.dim() != 2 or weight.shape[layout == "linear"] != in_width or weight.shape[layout != "linear"] == 0:
        wanted = f"(out, {in_width})" if layout == "linear" else f"({in_width}, out)"
        raise mismatch(argument, f"shape {wanted} with layout={layout!r}, {in_width} being {why}", tuple(weight.shape))
    return weight.shape[layout != "linear"]


def serving(x, weight, layout, backend):
    in_width = x.shape[-1]
    return backends.choose(
        "linear",
        x,
        x.dtype,
        backend,
        x.numel() // in_width,
        in_width,
        weight.shape[layout != "linear"],
        layout == "conv1d",
    )


# 2. Autograd


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layout, backend, *originals):
        ctx.save_for_backward(x, weight, bias)
        ctx.originals = originals
        ctx.layout, ctx.backend = layout, backend
        return linear_forward(x, weight, bias, layout, backend)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        needed = autocast.needed_by(ctx, 3)
        if torch.is_grad_enabled():  # create_graph=True: gradients that can themselves be differentiated
            formula = autocast.of_originals(functools.partial(reference.linear, layout=ctx.layout), ctx.originals)
            gradients = reference.differentiable_gradients(formula, (x, *(ctx.originals or (weight, bias))), needed, dy)
        else:
            gradients = linear_backward(dy, x, weight, ctx.layout, needed, ctx.backend, wide=bool(ctx.originals))
        return autocast.handed_out(ctx, gradients, 2)


# 3. Eager calls go straight to the backend; a tracer (torch.compile, export, fake tensors, dispatch modes) sees one opaque operator


def linear_forward(x, weight, bias, layout, backend):
    if isinstance(backend, ModuleType):
        return backend.linear_forward(x, weight, bias, layout)
    return torch.ops.fastlm.linear_forward(x, weight, bias, layout, backend)


def linear_backward(dy, x, weight, layout, needed, backend, wide):
    """wide: gradients of weights in float32, from a backend that has them so."""
    if isinstance(backend, ModuleType) and not opaque(dy, x, weight):
        return autocast.given_by(backend, "linear_backward", (dy, x, weight, layout, needed), wide)
    gradients = torch.ops.fastlm.linear_backward(dy, x, weight, layout, needed, backends.name_of(backend))
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


@torch.library.custom_op("fastlm::linear_forward", mutates_args=())
def linear_forward_op(x: Tensor, weight: Tensor, bias: Tensor | None, layout: str, backend: str | None) -> Tensor:
    return serving(x, weight, layout, backend).linear_forward(x, weight, bias, layout)


@torch.library.custom_op("fastlm::linear_backward", mutates_args=())
def linear_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, layout: str, needed: list[bool], backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    return present(x, *serving(x, weight, layout, backend).linear_backward(dy, x, weight, layout, needed))


# 4. Shapes and dtypes of the results, for tracing, and their cost


@linear_forward_op.register_fake
def linear_forward_fake(x, weight, bias, layout, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[layout != "linear"])


@linear_backward_op.register_fake
def linear_backward_fake(dy, x, weight, layout, needed, backend):
    return present(
        x,
        x.new_empty(x.shape) if needed[0] else None,
        weight.new_empty(weight.shape) if needed[1] else None,
        weight.new_empty(weight.shape[layout != "linear"]) if needed[2] else None,
    )


@register_flop_formula(torch.ops.fastlm.linear_forward)
def linear_forward_flops(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


@register_flop_formula(torch.ops.fastlm.linear_backward)
def linear_backward_flops(dy, x, weight, layout, needed, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight) * (needed[0] + needed[1])
