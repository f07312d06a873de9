"""What the normalizations of a residual sum share: checks, casts, dropout and the gradients of the sum."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.backends.contract import Implementation, Results
from fastlm.core.errors import mismatch
from fastlm.core.philox import dropout_mask
from fastlm.ops.operator import Operator


def check_same_or_float32(argument: str, tensor: Tensor, x: Tensor) -> None:
    """The tensor must have x's dtype, or float32 where x has 16 bits."""
    wider = tensor.dtype == torch.float32 and x.dtype.itemsize <= 2
    if tensor.device != x.device or (tensor.dtype != x.dtype and not wider):
        expected = f"{x.dtype}, as x," + (" or torch.float32" if x.dtype.itemsize == 2 else "")
        raise mismatch(argument, f"{expected} on {x.device}", f"{tensor.dtype} on {tensor.device}")


def widen_for_autocast(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> list[Tensor | None]:
    """Where x and residual differ, the narrower one is widened as an addition would; so are parameters below x."""
    if residual is not None and x.dtype != residual.dtype and residual.dtype != torch.float32:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    widened = [t if t is None or x.dtype.itemsize <= t.dtype.itemsize else t.to(x.dtype) for t in parameters]
    return [x, residual, *widened]


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """x after dropout over its flattened rows, scaled by 1 / (1 − p); x itself without a seed."""
    if seed is None:
        return x
    zero = torch.zeros((), dtype=torch.int64, device=x.device)
    keep = dropout_mask(seed, x.numel() // x.shape[-1], x.shape[-1], zero, p)
    return torch.where(keep.view(x.shape), x * (1 / (1 - p)), 0)


def same_gradient(call: Any) -> bool:
    """Whether the gradients of x and residual are one tensor."""
    return call.seed is None and call.summed.dtype == call.x_dtype


class ResidualNorm(Operator):
    """A normalization of a residual sum. Its inputs are x, residual and the parameters."""

    def norm_gradients(self, call: Any) -> Sequence[Tensor | None]:
        """The gradients of the sum and of the parameters that follow from dy, as a graph; None where not needed."""
        raise NotImplementedError

    def backward(self, call: Any, selected: Implementation[Any, Any] | str | None) -> Results:
        if not same_gradient(call):
            return super().backward(call, selected)
        needs_dx, needs_dresidual, *parameters = call.needed
        needed = needs_dx or needs_dresidual, False, *parameters
        dx, _, *gradients = super().backward(self.Backward(*call[:-1], needed), selected)
        return dx if needs_dx else None, dx if needs_dresidual else None, *gradients

    def differentiable_gradients(self, call: Any, originals: Sequence[Tensor | None]) -> Results:
        """As a graph over the upstream gradients, the parameters and the sum, whose own history leads to the inputs."""
        needs_dx, needs_dresidual, *parameters = call.needed
        ds = call.dsummed
        gradients: list[Tensor | None] = [None] * len(parameters)
        if call.dy is not None:
            dnorm, *gradients = self.norm_gradients(call)
            ds = dnorm if ds is None else ds if dnorm is None else ds + dnorm
        same = same_gradient(call)
        dx = dropout(ds, call.seed, call.dropout_p).to(call.x_dtype) if needs_dx or same else None
        dresidual = dx if same else ds
        return dx if needs_dx else None, dresidual if needs_dresidual else None, *gradients


def show_overflow(y: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """NaN in the rows whose sum of squares overflows: PyTorch's rstd is 0 there, which makes y the bias.

    Args:
        rstd: like y with a last dimension of 1.
        eps: of the norm. If it is infinite in the dtype of rstd, every rstd is 0, and rightly.
    """
    if eps > torch.finfo(rstd.dtype).max:
        return y, rstd
    if rstd.is_cpu and rstd.all():  # elsewhere the question would synchronise
        return y, rstd
    hidden = rstd == 0
    return y.masked_fill(hidden, torch.nan), rstd.masked_fill(hidden, torch.nan)
