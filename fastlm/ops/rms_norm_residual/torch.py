"""rms_norm_residual by PyTorch's RMSNorm. PyTorch has no fused backward on a CPU, so the formula serves."""

import torch
from torch import Tensor

from fastlm.backends import torch as native
from fastlm.backends.contract import Implementation
from fastlm.backends.reference import widen
from fastlm.core.autocast import no_autocast
from fastlm.ops.residual_norm import show_overflow
from fastlm.ops.rms_norm_residual.reference import backward
from fastlm.ops.rms_norm_residual.spec import Forward, Sizes


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    return [native.OTHER_DROPOUT] if sizes.dropout else []


def factors(weight: Tensor, unit_offset: bool) -> Tensor:
    """What the normalized rows are multiplied by, in at least float32: 16 bits would round 1 + weight."""
    (wide,) = widen(weight)
    return 1 + wide if unit_offset else wide


@no_autocast
def forward(call: Forward):
    x, residual, weight = call.x, call.residual, call.weight
    summed = None if residual is None else torch.add(residual, x).contiguous()
    # In float32: PyTorch's RMSNorm multiplies before it rounds, and Llama's after.
    (wide,) = widen(x if summed is None else summed)
    normalized, rstd = torch.ops.aten._fused_rms_norm(wide, weight.shape, None, call.eps)
    normalized, rstd = show_overflow(normalized, rstd, call.eps)
    if not call.unit_offset:
        normalized = normalized.to(x.dtype)
    y = (normalized * factors(weight, call.unit_offset)).to(x.dtype)
    return y.contiguous(), summed, rstd.view(x.shape[:-1])


implementation = Implementation(native.backend, forward, backward, refuses)
