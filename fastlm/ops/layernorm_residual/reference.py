"""layernorm_residual in plain PyTorch: the definition, differentiable to any order, never computed in 16 bits."""

import torch
from torch import Tensor

from fastlm.backends import reference
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import narrow, widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.layernorm_residual.spec import Backward, Forward
from fastlm.ops.residual_norm import dropout


def reciprocal_deviation(centred: Tensor, eps: float) -> Tensor:
    """NaN where the sum of squares overflows: a factor of 0 would give the bias as the result."""
    variance = centred.square().mean(-1, keepdim=True)
    return torch.where(variance < torch.inf, torch.rsqrt(variance + eps), torch.nan)


def layer_norm(summed: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    wide, w, b = widen(summed, weight, bias)
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * reciprocal_deviation(centred, eps) * w
    return (y if b is None else y + b).to(dtype)


@no_autocast
def forward(call: Forward):
    x, residual = call.x, call.residual
    summed = x
    if call.makes_sum():
        (wide,) = widen(dropout(widen(x)[0], call.seed, call.dropout_p))
        summed = (wide if residual is None else widen(residual)[0] + wide).to(call.stream.dtype).contiguous()
    (wide,) = widen(summed)  # the normalisation reads the sum as it is stored
    y = layer_norm(summed, call.weight, call.bias, call.eps, x.dtype).contiguous()
    mean = wide.mean(-1)
    rstd = reciprocal_deviation(wide - mean[..., None], call.eps)[..., 0]
    return y, summed if call.makes_sum() else None, mean, rstd


@no_autocast
def backward(call: Backward):
    g, wide, w, ds = widen(call.dy, call.summed, call.weight, call.dsummed)
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = call.needed
    dweight = dbias = None
    if g is None:
        dweight, dbias = (w.new_zeros(w.shape) if need else None for need in call.needed[2:])
    else:
        xhat = (wide - call.mean[..., None]) * call.rstd[..., None]
        gw = g * w
        dnorm = call.rstd[..., None] * (gw - gw.mean(-1, keepdim=True) - xhat * (gw * xhat).mean(-1, keepdim=True))
        ds = dnorm if ds is None else ds + dnorm
        dweight = (g * xhat).reshape(-1, w.shape[0]).sum(0) if needs_dweight else None
        dbias = g.reshape(-1, w.shape[0]).sum(0) if needs_dbias else None
    (dx,) = narrow(call.x_dtype, dropout(ds, call.seed, call.dropout_p) if needs_dx else None)
    (dresidual,) = narrow(call.summed.dtype, ds if needs_dresidual else None)
    return dx, dresidual, *narrow(call.weight.dtype, dweight, dbias)


implementation = Implementation(reference.backend, forward, backward)
