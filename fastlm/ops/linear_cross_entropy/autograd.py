"""How linear_cross_entropy is differentiated: the gradients come out of the forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.backends.contract import Implementation, Results
from fastlm.backends.cpu import check_storages
from fastlm.backends.selection import requested, select
from fastlm.core.tracing import needs_custom_op
from fastlm.ops.linear_cross_entropy import reference, spec
from fastlm.ops.operator import Operator, gradients_of, rounding

SERIAL = 32768  # PyTorch sums fewer elements than this on one thread, so in one order
NO_GRADIENTS = (False, False, False)


class LinearCrossEntropy(Operator):
    Forward, Sizes = spec.Forward, spec.Sizes
    results = 4

    def loss(
        self,
        call: spec.Forward,
        token_weight: Tensor | None,
        reduction: str,
        backend: str | None,
        originals: tuple[Tensor | None, ...],
    ) -> Tensor:
        """The reduced loss; call is one without gradients."""
        x, weight, bias, target = call[:4]
        if token_weight is not None and token_weight.requires_grad and torch.is_grad_enabled():
            losses = self.loss(call, None, "none", backend, originals)
            return reduce(losses, target, token_weight, call.ignore_index, reduction)
        selected: Implementation[Any, Any] | str | None
        if needs_custom_op(x, weight, bias, target, token_weight):
            selected = requested(backend)
        else:  # once: the backward uses the same
            selected = select(self, *call.subject(), backend)
            check_storages(self.tensor_names, call[: self.tensors])
            if selected.composite is not None and not originals and token_weight is None:
                composed = selected.composite(call, reduction)
                if composed is not NotImplemented:
                    return composed
        if torch.is_grad_enabled():
            for tensor in (x, weight, bias, *originals):
                if tensor is not None and tensor.requires_grad:
                    arguments = x, weight, bias, target, token_weight, call.settings(), reduction, selected
                    apply = directly if isinstance(selected, Implementation) else LinearCrossEntropyFunction.apply
                    return apply(*arguments, *originals)
        return reduce(self.forward(call, selected)[0], target, token_weight, call.ignore_index, reduction)

    def compute(
        self,
        tensors: Sequence[Tensor | None],
        row_scale: Tensor | None,
        settings: tuple[Any, ...],
        selected: Implementation[Any, Any] | str | None,
    ) -> Results:
        """forward(), which backward calls too: a tracer may watch by then."""
        if isinstance(selected, Implementation) and needs_custom_op(*tensors):
            selected = selected.backend.name
        return self.forward(spec.Forward(*tensors, row_scale, *settings), selected)


operator = LinearCrossEntropy("linear_cross_entropy", __package__ or "")


def ordered_sum(x: Tensor) -> Tensor:
    """The sum in an order that does not depend on the number of threads: in chunks."""
    if not torch.compiler.is_compiling() and x.numel() >= SERIAL:
        x = torch.stack([chunk.sum() for chunk in x.flatten().split(SERIAL - 1)])
    return x.sum()


def total_weight(target: Tensor, token_weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean divides by: the weights of the rows that are not ignored, each 1 without token_weight."""
    counted = target.ne(ignore_index)  # torch.compile of PyTorch 2.9 takes != for a bool here
    return counted.sum() if token_weight is None else ordered_sum(torch.where(counted, token_weight, 0))


def reduce(losses: Tensor, target: Tensor, token_weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    if token_weight is not None:
        losses = torch.where(target == ignore_index, 0, losses * token_weight)
    if reduction == "none":
        return losses
    total = ordered_sum(losses)
    return total / total_weight(target, token_weight, ignore_index) if reduction == "mean" else total


class LinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, token_weight, settings, reduction, selected, *originals):
        ctx.attributes = settings, reduction
        ctx.backend, ctx.originals = selected, originals
        ctx.traced = not isinstance(selected, Implementation)
        ctx.scale = row_scale = None
        needed = NO_GRADIENTS
        if reduction != "none":
            needed = inputs_needed(ctx)
            row_scale, ctx.scale = row_scales(x, target, token_weight, settings.ignore_index, reduction)
        call = *settings, bool(originals), needed
        losses, *gradients = operator.compute((x, weight, bias, target), row_scale, call, selected)
        ctx.gradients = None
        if ctx.traced:
            ctx.save_for_backward(x, weight, bias, target, token_weight, *gradients)
        else:  # kept by the context itself, so that the first backward can return them instead of a copy
            ctx.save_for_backward(x, weight, bias, target, token_weight)
            ctx.gradients = gradients if any(needed) else None
        return reduce(losses, target, token_weight, settings.ignore_index, reduction)

    @staticmethod
    def backward(ctx, dloss):
        x, weight, bias, target, token_weight, *gradients = ctx.saved_tensors
        settings, reduction = ctx.attributes
        needed, originals = inputs_needed(ctx), ctx.originals

        def recompute(row_scale):
            call = *settings, bool(originals), needed
            return operator.compute((x, weight, bias, target), row_scale, call, ctx.backend)[1:]

        if torch.is_grad_enabled():  # create_graph=True: gradients that can themselves be differentiated
            tensors = (x, weight, bias), target, token_weight
            gradients = differentiable_gradients(dloss, *tensors, settings, reduction, needed, originals)
        elif reduction == "none":
            gradients = recompute((dloss if token_weight is None else dloss * token_weight).contiguous())
        elif ctx.traced:
            gradients = [d if d is None else d * scaled(dloss, ctx.scale) for d in gradients]
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:  # a second backward through the same graph: the first returned them
                gradients = recompute(row_scales(x, target, token_weight, settings.ignore_index, reduction)[0])
            factor = scaled(dloss, ctx.scale)
            # A factor of 1, which a loss at the end of the graph has, saves a pass over the gradients.
            if factor.device.type != "cpu" or factor.item() != 1:
                gradients = [d if d is None else d.mul_(factor) for d in gradients]
        none = (None,) * 5
        if originals:
            return gradients[0], None, None, *none, *gradients[1:]
        return *gradients, *none


# Without what Function.apply does in Python for torch.func transforms, which select() refuses.
directly = super(torch.autograd.Function, LinearCrossEntropyFunction).apply


def inputs_needed(ctx: Any) -> tuple[bool, ...]:
    """Which gradients of x, weight and bias are needed; of the original weights, where autocast rounded them."""
    if ctx.originals:
        return ctx.needs_input_grad[0], *ctx.needs_input_grad[8:]
    return ctx.needs_input_grad[:3]


def row_scales(
    x: Tensor, target: Tensor, token_weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """The weight of each row's loss in the result: (row_scale for the kernel, a scalar to multiply by in backward).

    float16 gradients of a mean would underflow before a gradient scaler can lift them: they are divided by the number
    of rows in backward.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    ones = x.new_ones(target.shape, dtype=dtype) if token_weight is None else token_weight
    if reduction == "sum":
        return ones, None
    share = divisor(total_weight(target, token_weight, ignore_index)).to(dtype).reciprocal()
    if x.dtype == torch.float16:
        return ones, share
    return (share.expand(target.shape).contiguous() if token_weight is None else token_weight * share), None


def divisor(total: Tensor) -> Tensor:
    """A mean over no rows has gradient 0."""
    return torch.where(total == 0, 1, total)


def scaled(dloss: Tensor, scale: Tensor | None) -> Tensor:
    return dloss if scale is None else dloss * scale


def differentiable_gradients(
    dloss, inputs, target, token_weight, settings, reduction, needed, originals
) -> list[Tensor | None]:
    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        losses = reference.row_losses(x, weight, bias, target, settings)
        if token_weight is not None:
            losses = torch.where(target == settings.ignore_index, 0, losses * token_weight)
        if reduction == "none":
            return losses
        if reduction == "sum":
            return losses.sum()
        return losses.sum() / divisor(total_weight(target, token_weight, settings.ignore_index))

    if originals:
        return gradients_of(rounding(formula, inputs[0].dtype), (inputs[0], *originals), needed, (dloss,))
    return gradients_of(formula, inputs, needed, (dloss,))
