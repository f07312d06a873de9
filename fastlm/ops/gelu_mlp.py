"""y = gelu(x W1 + b1) W2 + b2: the feed-forward block (GELU: Hendrycks & Gimpel, 2016, arXiv:1606.08415)."""

import functools
import math
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastlm import backends
from fastlm.backends import reference
from fastlm.ops import autocast
from fastlm.ops.boundary import autocasts, check_choice, check_like, check_rows, check_vector, opaque, present
from fastlm.ops.linear import LAYOUTS, check_weight

APPROXIMATIONS = ("none", "tanh")
LEVELS = (0, 1, 2)
NOTHING = LEVELS[-1]  # the recompute level that saves nothing but the inputs

# 1. The function people call


def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: str = "none",
    layout: str = "linear",
    recompute: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Two matrix products with a GELU between them.

    Args:
        x: (..., in), floating point, any strides. Under autocast everything is cast as for `torch.nn.functional.linear`.
        w1: (hidden, in) with layout="linear" (torch.nn.Linear), (in, hidden) with layout="conv1d" (GPT-2's Conv1D); dtype and device of x.
        b1: (hidden,) or None.
        w2: (out, hidden), or (hidden, out) with layout="conv1d".
        b2: (out,) or None.
        approximate: "none" for the exact GELU (erf), "tanh" for GPT-2's.
        layout: how both weights are stored; no layout is ever transposed in memory.
        recompute: what the backward computes again rather than keep: 0 nothing, 1 the GELU (half the memory), 2 the first product too (+1/6 FLOPs).
        backend: force one backend by name; None takes the first that can (see fastlm.info()).

    Returns:
        (..., out), contiguous, in x's dtype.

    Raises:
        ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, can serve this call; the message lists why.
    """
    originals: tuple = ()
    if autocasts(x):
        x, originals, w1, b1, w2, b2 = autocast.lowered_for(x, w1, b1, w2, b2)
    check_rows(x)
    check_choice("approximate", approximate, APPROXIMATIONS)
    check_choice("layout", layout, LAYOUTS)
    check_choice("recompute", recompute, LEVELS)
    hidden_width = check_weight("w1", w1, x.shape[-1], layout, "the last dimension of x")
    out_width = check_weight("w2", w2, hidden_width, layout, "the output width of w1")
    check_like("w1", w1, x)
    check_like("w2", w2, x)
    if b1 is not None:
        check_vector("b1", b1, hidden_width, "the output width of w1")
        check_like("b1", b1, x)
    if b2 is not None:
        check_vector("b2", b2, out_width, "the output width of w2")
        check_like("b2", b2, x)

    backend = (
        backends.requested(backend) if opaque(x, w1, b1, w2, b2) else serving(x, w1, w2, layout, backend)
    )  # once: the backward uses the same
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2, *originals)):
        return GeluMlp.apply(x, w1, b1, w2, b2, approximate, layout, recompute, backend, *originals)
    return gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, NOTHING, backend)[0]


def serving(x, w1, w2, layout, backend):
    in_width = x.shape[-1]
    conv1d = layout == "conv1d"
    return backends.choose(
        "gelu_mlp", x, x.dtype, backend, x.numel() // in_width, in_width, w1.shape[conv1d], w2.shape[conv1d], conv1d
    )


# 2. Autograd


class GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, approximate, layout, recompute, backend, *originals):
        y, hidden, activated = gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute, backend)
        ctx.save_for_backward(x, w1, b1, w2, b2, hidden, activated)
        ctx.approximate, ctx.layout, ctx.backend, ctx.originals = approximate, layout, backend, originals
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, b1, w2, b2, hidden, activated = ctx.saved_tensors
        needed = autocast.needed_by(ctx, 5)
        if torch.is_grad_enabled():  # create_graph=True: gradients that can themselves be differentiated
            formula = autocast.of_originals(
                functools.partial(reference.gelu_mlp, approximate=ctx.approximate, layout=ctx.layout), ctx.originals
            )
            gradients = reference.differentiable_gradients(
                formula, (x, *(ctx.originals or (w1, b1, w2, b2))), needed, dy
            )
        else:
            saved = x, w1, b1, w2, hidden, activated
            gradients = gelu_mlp_backward(
                dy, *saved, ctx.approximate, ctx.layout, needed, ctx.backend, wide=bool(ctx.originals)
            )
        return autocast.handed_out(ctx, gradients, 4)


# 3. Eager calls go straight to the backend; a tracer sees one opaque operator


def gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute, backend):
    """(y, hidden, activated): both sides of the GELU, None where the level of recomputation does not keep them."""
    if isinstance(backend, ModuleType):
        return backend.gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute)
    y, hidden, activated = torch.ops.fastlm.gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute, backend)
    return y, hidden if recompute < 2 else None, activated if recompute < 1 else None


def gelu_mlp_backward(dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed, backend, wide):
    """wide: gradients of weights in float32, from a backend that has them so."""
    arguments = dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed
    if isinstance(backend, ModuleType) and not opaque(dy, x, w1, b1, w2):
        return autocast.given_by(backend, "gelu_mlp_backward", arguments, wide)
    gradients = torch.ops.fastlm.gelu_mlp_backward(*arguments, backends.name_of(backend))
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


@torch.library.custom_op("fastlm::gelu_mlp_forward", mutates_args=())
def gelu_mlp_forward_op(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: str,
    layout: str,
    recompute: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    serves = serving(x, w1, w2, layout, backend)
    return present(x, *serves.gelu_mlp_forward(x, w1, b1, w2, b2, approximate, layout, recompute))


@torch.library.custom_op("fastlm::gelu_mlp_backward", mutates_args=())
def gelu_mlp_backward_op(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    hidden: Tensor | None,
    activated: Tensor | None,
    approximate: str,
    layout: str,
    needed: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    serves = serving(x, w1, w2, layout, backend)
    return present(x, *serves.gelu_mlp_backward(dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed))


# 4. Shapes and dtypes of the results, for tracing, and their cost


@gelu_mlp_forward_op.register_fake
def gelu_mlp_forward_fake(x, w1, b1, w2, b2, approximate, layout, recompute, backend):
    out = layout != "linear"
    hidden = (*x.shape[:-1], w1.shape[out])
    return present(
        x,
        x.new_empty(*x.shape[:-1], w2.shape[out]),
        x.new_empty(hidden) if recompute < 2 else None,
        x.new_empty(hidden) if recompute < 1 else None,
    )


@gelu_mlp_backward_op.register_fake
def gelu_mlp_backward_fake(dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed, backend):
    out = layout != "linear"
    shapes = (x.shape, w1.shape, w1.shape[out:][:1], w2.shape, w2.shape[out:][:1])
    return present(x, *(x.new_empty(shape) if need else None for shape, need in zip(shapes, needed, strict=True)))


@register_flop_formula(torch.ops.fastlm.gelu_mlp_forward)
def gelu_mlp_forward_flops(x, w1, b1, w2, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(w1) + math.prod(w2))


@register_flop_formula(torch.ops.fastlm.gelu_mlp_backward)
def gelu_mlp_backward_flops(
    dy, x, w1, b1, w2, hidden, activated, approximate, layout, needed, *args, out_shape=None, **kwargs
) -> int:
    rows, first, second = math.prod(x[:-1]), math.prod(w1), math.prod(w2)
    again = first if hidden is None else 0
    return 2 * rows * (again + first * (needed[0] + needed[1]) + second * (any(needed[:3]) + needed[3]))
