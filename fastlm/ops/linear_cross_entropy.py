"""The cross-entropy of x Wᵀ + b against targets, by chunks of rows: the logits, rows × vocabulary, are never there at once."""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastlm import backends
from fastlm.backends import reference
from fastlm.ops import autocast
from fastlm.ops.boundary import autocasts, check_choice, check_like, check_rows, check_vector, mismatch, opaque, present
from fastlm.ops.linear import check_weight

REDUCTIONS = ("mean", "sum", "none")
SERIAL = 32768  # PyTorch sums fewer elements than this on one thread, so in one order
NOTHING = (False, False, False)

# 1. The function people call


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(linear(x, weight, bias), target) without the logits.

    The gradients are computed in the forward pass when they are wanted: a chunk of logits is turned into its gradient while it is there.

    Args:
        x: (..., width), floating point, any strides. Under autocast x, weight and bias are cast as for `torch.nn.functional.linear`.
        weight: (vocab, width): the output projection, often the token embedding itself; dtype and device of x.
        target: (...), int64: class indices in [0, vocab), or ignore_index. Class probabilities are not supported.
        bias: (vocab,) or None.
        ignore_index: a row with this target has loss 0, no gradient, and is not counted by "mean".
        reduction: "mean" (over the rows that are not ignored; NaN if there are none), "sum" or "none".
        label_smoothing: in [0, 1]: this share of the target's probability is spread over the whole vocabulary.
        backend: force one backend by name; None takes the first that can (see fastlm.info()).

    Returns:
        The loss in float32 (float64 for float64), whatever the dtype of x: a scalar, or like target with reduction="none".

    Raises:
        ValueError: an argument that does not fit; the message names it. A target out of range is named with its value and position
            (on a GPU it is a device assert).
        fastlm.Unsupported: no backend, or not the forced one, can serve this call; the message lists why.
    """
    originals: tuple = ()
    if autocasts(x):
        x, originals, weight, bias = autocast.lowered_for(x, weight, bias)
    check_rows(x)
    vocab = check_weight("weight", weight, x.shape[-1], "linear", "the last dimension of x")
    check_like("weight", weight, x)
    if target.dtype.is_floating_point:
        raise mismatch("target", "class indices in int64 (class probabilities are not supported)", target.dtype)
    if target.dtype != torch.int64 or target.device != x.device:
        raise mismatch("target", f"torch.int64 on {x.device}", f"{target.dtype} on {target.device}")
    if target.shape != x.shape[:-1]:
        raise mismatch("target", f"shape {tuple(x.shape[:-1])}, x's without its last dimension", tuple(target.shape))
    if bias is not None:
        check_vector("bias", bias, vocab, "the vocabulary of weight")
        check_like("bias", bias, x)
    check_choice("reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise mismatch("label_smoothing", "a share in [0, 1]", label_smoothing)
    label_smoothing = float(label_smoothing)  # whole numbers are another type to a kernel

    backend = (
        backends.requested(backend) if opaque(x, weight, target, bias) else serving(x, weight, backend)
    )  # once: the backward uses the same
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *originals)):
        return LinearCrossEntropy.apply(
            x, weight, bias, target, ignore_index, reduction, label_smoothing, backend, *originals
        )
    losses = linear_cross_entropy_forward(
        x, weight, bias, target, None, ignore_index, label_smoothing, NOTHING, backend
    )[0]
    return reduced(losses, target, ignore_index, reduction)


def serving(x, weight, backend):
    width = x.shape[-1]
    return backends.choose("linear_cross_entropy", x, x.dtype, backend, x.numel() // width, width, weight.shape[0])


def reduced(losses, target, ignore_index, reduction):
    if reduction == "none":
        return losses
    if (
        not torch.compiler.is_compiling() and losses.numel() >= SERIAL
    ):  # in parts, so that the order does not follow the number of threads
        losses = torch.stack([part.sum() for part in losses.flatten().split(SERIAL - 1)])
    return losses.sum() / (target != ignore_index).sum() if reduction == "mean" else losses.sum()


# 2. Autograd


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, ignore_index, reduction, label_smoothing, backend, *originals):
        ctx.settings = ignore_index, reduction, label_smoothing
        ctx.backend, ctx.originals = backend, originals
        ctx.traced = not isinstance(backend, ModuleType)
        ctx.scale = row_scale = None
        needed = NOTHING if reduction == "none" else autocast.needed_by(ctx, 3)
        if reduction != "none":
            row_scale, ctx.scale = scales(x, target, ignore_index, reduction)
        arguments = x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed, backend
        losses, *gradients = linear_cross_entropy_forward(*arguments, wide=bool(originals))
        ctx.gradients = None
        if ctx.traced:
            ctx.save_for_backward(x, weight, bias, target, *gradients)
        else:  # kept by the context itself, so that the first backward can hand them out instead of a copy
            ctx.save_for_backward(x, weight, bias, target)
            ctx.gradients = gradients if any(needed) else None
        return reduced(losses, target, ignore_index, reduction)

    @staticmethod
    def backward(ctx, dloss):
        x, weight, bias, target, *gradients = ctx.saved_tensors
        ignore_index, reduction, label_smoothing = ctx.settings
        needed = autocast.needed_by(ctx, 3)
        again = (x, weight, bias, target), (ignore_index, label_smoothing, needed, ctx.backend, bool(ctx.originals))
        if torch.is_grad_enabled():  # create_graph=True: gradients that can themselves be differentiated
            gradients = differentiable_gradients(dloss, (x, weight, bias), target, *ctx.settings, needed, ctx.originals)
        elif reduction == "none":
            gradients = linear_cross_entropy_forward(*again[0], dloss.contiguous(), *again[1])[1:]
        elif ctx.traced:
            gradients = [d if d is None else d * later(dloss, ctx.scale) for d in gradients]
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:  # a second backward through the same graph: the first took them
                row_scale, _ = scales(x, target, ignore_index, reduction)
                gradients = linear_cross_entropy_forward(*again[0], row_scale, *again[1])[1:]
            factor = later(dloss, ctx.scale)
            if (
                factor.device.type != "cpu" or factor.item() != 1
            ):  # a loss that is the end of the graph saves a pass over the weight
                gradients = [d if d is None else d.mul_(factor) for d in gradients]
        return autocast.handed_out(ctx, gradients, 5)


def scales(x, target, ignore_index, reduction):
    """How much each row's loss weighs in the result: (row_scale to use in the kernel, a scalar to multiply by in backward or None).

    float16 gradients of a mean would underflow before a gradient scaler can lift them: those are divided by the count only in backward.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if reduction == "sum":
        return x.new_ones(target.shape, dtype=dtype), None
    share = (target != ignore_index).sum().clamp(min=1).to(dtype).reciprocal()
    if x.dtype == torch.float16:
        return x.new_ones(target.shape, dtype=dtype), share
    return share.expand(target.shape).contiguous(), None


def later(dloss, scale):
    return dloss if scale is None else dloss * scale


def differentiable_gradients(dloss, inputs, target, ignore_index, reduction, label_smoothing, needed, originals):
    def formula(x, weight, bias):
        losses = reference.row_losses(x, weight, bias, target, ignore_index, label_smoothing)
        # a mean over no rows is NaN, but its gradient is 0
        return (
            losses
            if reduction == "none"
            else losses.sum() / (target != ignore_index).sum().clamp(min=1)
            if reduction == "mean"
            else losses.sum()
        )

    return reference.differentiable_gradients(
        autocast.of_originals(formula, originals), (inputs[0], *(originals or inputs[1:])), needed, dloss
    )


# 3. Eager calls go straight to the backend; a tracer sees one opaque operator


def linear_cross_entropy_forward(
    x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed, backend, wide=False
):
    """(losses of the rows, and of those that are needed, dx, dweight, dbias of Σ row_scale · loss); wide: as in linear."""
    arguments = x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed
    if isinstance(backend, ModuleType) and not opaque(
        x, weight, bias, target
    ):  # also called in backward, where a tracer may watch by now
        return autocast.given_by(backend, "linear_cross_entropy_forward", arguments, wide)
    losses, *gradients = torch.ops.fastlm.linear_cross_entropy_forward(*arguments, backends.name_of(backend))
    return losses, *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))


@torch.library.custom_op("fastlm::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    needed: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    serves = serving(x, weight, backend)
    return present(
        x,
        *serves.linear_cross_entropy_forward(x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed),
    )


# 4. Shapes and dtypes of the results, for tracing, and their cost


@linear_cross_entropy_forward_op.register_fake
def linear_cross_entropy_forward_fake(
    x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed, backend
):
    losses = x.new_empty(target.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return present(
        x, losses, *(x.new_empty(shape) if need else None for shape, need in zip(shapes, needed, strict=True))
    )


@register_flop_formula(torch.ops.fastlm.linear_cross_entropy_forward)
def linear_cross_entropy_flops(
    x, weight, bias, target, row_scale, ignore_index, label_smoothing, needed, *args, out_shape=None, **kwargs
) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight) * (1 + needed[0] + needed[1])
