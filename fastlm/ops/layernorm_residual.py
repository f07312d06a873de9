"""s = residual + dropout(x), y = LayerNorm(s) · weight + bias, over the last dimension (Ba, Kiros & Hinton, 2016, arXiv:1607.06450)."""

import functools
from types import ModuleType

import torch
from torch import Tensor

from fastlm import backends
from fastlm.backends import reference
from fastlm.ops.boundary import (
    autocasts,
    check_like,
    check_probability,
    check_rows,
    check_vector,
    draw_seed,
    mismatch,
    opaque,
    present,
)

# 1. The function people call


def layernorm_residual(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add x, after dropout, to the residual stream and normalise the sum: a pre-norm block uses both results, a post-norm block the first.

    Args:
        x: (..., width), floating point, any strides.
        residual: like x, in x's dtype or float32 (a float32 stream through a 16-bit model), or None.
        weight: (width,), in x's dtype or float32.
        bias: (width,) or None, in weight's dtype.
        eps: added to the variance; > 0.
        dropout_p: probability of zeroing an element of x, in [0, 1); active exactly when > 0 (a module passes 0 in eval).
        backend: force one backend by name; None takes the first that can (see fastlm.info()).

    Under autocast on a CPU nothing is cast, as for `torch.nn.functional.layer_norm`, but where x and residual differ the narrower one is widened
    as an addition would; on a GPU everything is cast to float32.

    Returns:
        (normalised, summed): normalised like x; summed like residual (like x without one), contiguous. The normalisation reads `summed` as it is
        stored. Without residual and dropout `summed` is x itself. Statistics are in float32 (float64 for float64) whatever the dtype.

    Raises:
        ValueError: an argument that does not fit; the message names it.
        fastlm.Unsupported: no backend, or not the forced one, can serve this call; the message lists why.
    """
    if autocasts(x):
        x, residual, weight, bias = autocast(x, residual, weight, bias)
    check_rows(x)
    if residual is not None:
        if residual.shape != x.shape:
            raise mismatch("residual", f"shape {tuple(x.shape)}, as x", tuple(residual.shape))
        check_wide("residual", residual, x)
    check_vector("weight", weight, x.shape[-1], "the last dimension of x")
    check_wide("weight", weight, x)
    if bias is not None:
        check_vector("bias", bias, x.shape[-1], "the last dimension of x")
        check_like("bias", bias, weight, "weight")
    if not eps > 0:
        raise mismatch("eps", "a positive number", eps)
    eps = float(eps)  # whole numbers are another type to a kernel
    check_probability("dropout_p", dropout_p)

    dropout = dropout_p > 0
    backend = (
        backends.requested(backend) if opaque(x, residual, weight, bias) else serving(x, x.dtype, dropout, backend)
    )  # once: the backward too
    seed = draw_seed(x) if dropout else None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        y, summed = LayerNormResidual.apply(x, residual, weight, bias, seed, eps, dropout_p, backend)
    else:
        y, summed, _, _ = layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p, backend)
    return y, x if summed is None else summed


def check_wide(argument: str, tensor: Tensor, x: Tensor) -> None:
    """x's dtype, or float32 where that is the wider one."""
    if tensor.device != x.device or (
        tensor.dtype != x.dtype and (tensor.dtype != torch.float32 or x.dtype.itemsize > 2)
    ):
        wanted = f"{x.dtype}, as x," + (" or torch.float32" if x.dtype.itemsize == 2 else "")
        raise mismatch(argument, f"{wanted} on {x.device}", f"{tensor.dtype} on {tensor.device}")


def autocast(x, residual, *parameters):
    if x.device.type != "cpu":
        return [t if t is None or t.dtype == torch.float64 else t.float() for t in (x, residual, *parameters)]
    if residual is not None and x.dtype != residual.dtype and residual.dtype != torch.float32:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return x, residual, *(t if t is None or x.dtype.itemsize <= t.dtype.itemsize else t.to(x.dtype) for t in parameters)


def serving(x, dtype, dropout, backend):
    width = x.shape[-1]
    return backends.choose("layernorm_residual", x, dtype, backend, x.numel() // width, width, dropout)


# 2. Autograd


class LayerNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, eps, dropout_p, backend):
        ctx.set_materialize_grads(False)
        y, summed, mean, rstd = layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p, backend)
        # Of the inputs only their sum is kept: the gradients depend on nothing else of them.
        ctx.save_for_backward(x if summed is None else summed, weight, mean, rstd, seed)
        ctx.eps, ctx.dropout_p, ctx.dtype, ctx.backend = eps, dropout_p, x.dtype, backend
        return y, summed

    @staticmethod
    def backward(ctx, dy, dsummed):
        summed, weight, mean, rstd, seed = ctx.saved_tensors
        needs_dx, needs_dresidual, needs_dweight, needs_dbias = ctx.needs_input_grad[:4]
        if dy is None and dsummed is None:
            return None, None, None, None, None, None, None, None
        shared = seed is None and summed.dtype == ctx.dtype  # then dx and dresidual are one tensor
        needed = (needs_dx or (shared and needs_dresidual), needs_dresidual and not shared, needs_dweight, needs_dbias)
        if torch.is_grad_enabled():  # create_graph=True: gradients that can themselves be differentiated
            gradients = differentiable_gradients(
                dy, dsummed, summed, weight, seed, ctx.eps, ctx.dropout_p, ctx.dtype, needed
            )
        else:
            gradients = layernorm_residual_backward(
                dy, dsummed, summed, weight, mean, rstd, seed, ctx.dropout_p, ctx.dtype, needed, ctx.backend
            )
        dx, dresidual, dweight, dbias = gradients
        if shared:
            dresidual = dx
        return dx if needs_dx else None, dresidual if needs_dresidual else None, dweight, dbias, None, None, None, None


def differentiable_gradients(dy, dsummed, summed, weight, seed, eps, dropout_p, dtype, needed):
    """The gradients as a graph over dy, dsummed, the sum (whose own path to x and residual is this very Function) and the weight."""
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = needed
    ds, dweight, dbias = dsummed, None, None
    if dy is not None:
        formula = functools.partial(reference.layer_norm, bias=None, eps=eps, dtype=dtype)
        normalised, dweight = reference.differentiable_gradients(
            formula, (summed, weight), (needs_dx or needs_dresidual, needs_dweight), dy
        )
        ds = normalised if ds is None else ds if normalised is None else ds + normalised
        dbias = dy.reshape(-1, weight.shape[0]).sum(0).to(weight.dtype) if needs_dbias else None
    return (
        reference.dropped(ds, seed, dropout_p).to(dtype) if needs_dx else None,
        ds if needs_dresidual else None,
        dweight,
        dbias,
    )


# 3. Eager calls go straight to the backend; a tracer sees one opaque operator


def layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p, backend):
    """(y, summed, mean, rstd); summed is None where it is x itself."""
    if isinstance(backend, ModuleType):
        return backend.layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p)
    y, summed, mean, rstd = torch.ops.fastlm.layernorm_residual_forward(
        x, residual, weight, bias, seed, eps, dropout_p, backend
    )
    return y, None if residual is None and seed is None else summed, mean, rstd


def layernorm_residual_backward(dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed, backend):
    arguments = dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed
    if isinstance(backend, ModuleType) and not opaque(dy, dsummed, summed, weight):
        return backend.layernorm_residual_backward(*arguments)
    gradients = torch.ops.fastlm.layernorm_residual_backward(*arguments, backends.name_of(backend))
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]


@torch.library.custom_op("fastlm::layernorm_residual_forward", mutates_args=())
def layernorm_residual_forward_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    serves = serving(x, x.dtype, seed is not None, backend)
    return present(x, *serves.layernorm_residual_forward(x, residual, weight, bias, seed, eps, dropout_p))


@torch.library.custom_op("fastlm::layernorm_residual_backward", mutates_args=())
def layernorm_residual_backward_op(
    dy: Tensor | None,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
    needed: list[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    serves = serving(summed, dtype, seed is not None, backend)
    gradients = serves.layernorm_residual_backward(
        dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed
    )
    return present(summed, *(own(gradient, dsummed) for gradient in gradients))


def own(gradient, dsummed):
    """A torch.library operator must not return its input: a gradient that is dsummed unchanged is copied."""
    return gradient.clone() if gradient is not None and gradient is dsummed else gradient


# 4. Shapes and dtypes of the results, for tracing


@layernorm_residual_forward_op.register_fake
def layernorm_residual_forward_fake(x, residual, weight, bias, seed, eps, dropout_p, backend):
    summed = (
        None
        if residual is None and seed is None
        else x.new_empty(x.shape, dtype=(x if residual is None else residual).dtype)
    )
    y, summed = present(x, x.new_empty(x.shape), summed)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
    return y, summed, mean, rstd


@layernorm_residual_backward_op.register_fake
def layernorm_residual_backward_fake(dy, dsummed, summed, weight, mean, rstd, seed, dropout_p, dtype, needed, backend):
    dtypes = (dtype, summed.dtype, weight.dtype, weight.dtype)
    shapes = (summed.shape, summed.shape, weight.shape, weight.shape)
    return present(
        summed,
        *(summed.new_empty(s, dtype=d) if need else None for s, d, need in zip(shapes, dtypes, needed, strict=True)),
    )
