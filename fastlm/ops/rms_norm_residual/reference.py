"""rms_norm_residual in plain PyTorch: the definition, differentiable to any order."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.residual_norm import dropout
from fastlm.ops.rms_norm_residual.spec import Backward, Forward


def reciprocal_root_mean_square(wide: Tensor, eps: float) -> Tensor:
    """NaN where the sum of squares overflows: a factor of 0 would give 0 as the result."""
    mean = wide.square().mean(-1, keepdim=True)
    return torch.where(mean < torch.inf, torch.rsqrt(mean + eps), torch.nan)


def scaled(normalized: Tensor, weight: Tensor, unit_offset: bool, dtype: torch.dtype) -> Tensor:
    """As Llama rounds it, to dtype before the weight, or as Gemma does, after 1 + weight."""
    (w,) = widen(weight)
    if unit_offset:
        return (normalized * (1 + w)).to(dtype)
    return (widen(normalized.to(dtype))[0] * w).to(dtype)


def rms_norm(summed: Tensor, weight: Tensor, eps: float, unit_offset: bool, dtype: torch.dtype) -> Tensor:
    (wide,) = widen(summed)
    return scaled(wide * reciprocal_root_mean_square(wide, eps), weight, unit_offset, dtype)


@no_autocast
def forward(call: Forward):
    x, residual = call.x, call.residual
    summed = x
    if call.makes_sum():
        (wide,) = widen(dropout(widen(x)[0], call.seed, call.dropout_p))
        summed = (wide if residual is None else widen(residual)[0] + wide).to(call.stream.dtype).contiguous()
    (wide,) = widen(summed)  # the normalization reads the sum as it is stored
    rstd = reciprocal_root_mean_square(wide, call.eps)
    y = scaled(wide * rstd, call.weight, call.unit_offset, x.dtype).contiguous()
    return y, summed if call.makes_sum() else None, rstd[..., 0].contiguous()


@no_autocast
def backward(call: Backward):
    g, wide, w, ds = widen(call.dy, call.summed, call.weight, call.dsummed)
    needs_dx, needs_dresidual, needs_dweight = call.needed
    dweight = None
    if g is None:
        dweight = w.new_zeros(w.shape) if needs_dweight else None
    else:
        rstd = call.rstd[..., None]
        normalized = wide * rstd
        gw = g * (1 + w if call.unit_offset else w)
        dnorm = rstd * (gw - normalized * (gw * normalized).mean(-1, keepdim=True))
        ds = dnorm if ds is None else ds + dnorm
        dweight = (g * normalized).reshape(-1, w.shape[0]).sum(0) if needs_dweight else None
    (dx,) = narrow(call.x_dtype, dropout(ds, call.seed, call.dropout_p) if needs_dx else None)
    (dresidual,) = narrow(call.summed.dtype, ds if needs_dresidual else None)
    return dx, dresidual, *narrow(call.weight.dtype, dweight)


implementation = Implementation(reference.backend, forward, backward)
