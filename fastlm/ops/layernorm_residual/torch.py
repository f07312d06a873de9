"""layernorm_residual by PyTorch's native_layer_norm."""

import torch

from fastlm.backends import torch as native
from fastlm.backends.contract import Implementation
from fastlm.core.autocast import no_autocast
from fastlm.ops.layernorm_residual.spec import Backward, Forward, Sizes
from fastlm.ops.residual_norm import show_overflow

aten = torch.ops.aten


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    return [native.OTHER_DROPOUT] if sizes.dropout else []


def float32_weight(weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight in the dtype that the statistics shall have: 16 bits would round them, and be slower."""
    return weight if weight is None or dtype == torch.float64 else weight.float()


@no_autocast
def forward(call: Forward):
    x, residual = call.x, call.residual
    summed = None if residual is None else torch.add(residual, x).contiguous()
    w, b = float32_weight(call.weight, x.dtype), float32_weight(call.bias, x.dtype)
    y, mean, rstd = torch.native_layer_norm(x if summed is None else summed, w.shape, w, b, call.eps)
    y, rstd = show_overflow(y, rstd, call.eps)
    return y.to(x.dtype).contiguous(), summed, mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


@no_autocast
def backward(call: Backward):
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = call.needed
    summed, weight = call.summed, call.weight
    ds, dweight, dbias = call.dsummed, None, None
    if call.dy is None:
        dweight, dbias = (torch.zeros_like(weight) if need else None for need in call.needed[2:])
    else:
        w = float32_weight(weight, call.x_dtype)
        statistics = call.mean[..., None], call.rstd[..., None]
        needed = [needs_dx or needs_dresidual, needs_dweight, needs_dbias]
        ds, dweight, dbias = aten.native_layer_norm_backward(
            call.dy.to(summed.dtype), summed, w.shape, *statistics, w, w, needed
        )
        dweight = dweight.to(weight.dtype) if needs_dweight else None
        dbias = dbias.to(weight.dtype) if needs_dbias else None
        if ds is not None and call.dsummed is not None:
            ds.add_(call.dsummed)
    dx = ds.to(call.x_dtype).contiguous() if needs_dx else None
    return dx, ds.contiguous() if needs_dresidual else None, dweight, dbias


def composite(call: Forward):
    """In one dtype, in which PyTorch rounds nothing between its operators, and where no sum of squares overflows."""
    x, residual, weight = call.x, call.residual, call.weight
    if x.dtype != weight.dtype or x.dtype.itemsize < 4 or not x.is_cpu:
        return NotImplemented
    summed = None if residual is None else torch.add(residual, x).contiguous()
    y, _, rstd = torch.native_layer_norm(x if summed is None else summed, weight.shape, weight, call.bias, call.eps)
    # The smallest value takes less than half the time of all(); it is NaN if any is, and may then hide a 0.
    if x.numel() > 0 and not rstd.min().item() > 0:
        return NotImplemented
    return y.contiguous(), summed


implementation = Implementation(native.backend, forward, backward, refuses, composite)
