"""rms_norm_residual by the C++ kernel (csrc/cpu/rms_norm_residual.h)."""

import torch

from fastlm.backends import cpu
from fastlm.backends.contract import Implementation
from fastlm.backends.cpu import kernels, new, new_like, seed_value, vector, zeros
from fastlm.core.layout import strided_rows
from fastlm.ops.rms_norm_residual.spec import Backward, Forward


def forward(call: Forward):
    x = call.x
    y, summed = new_like(x), new_like(call.stream, call.makes_sum())
    rstd = new(x, x.shape[:-1], dtype=torch.float32)
    if x.numel():
        kernels.rms_norm_residual_forward(
            x=strided_rows(x),
            residual=strided_rows(call.residual),
            weight=vector(call.weight),
            y=y,
            summed=summed,
            rstd=rstd,
            eps=call.eps,
            unit_offset=call.unit_offset,
            dropout_p=call.dropout_p,
            seed=seed_value(call.seed),
            threads=cpu.threads(),
        )
    return y, summed, rstd


def backward(call: Backward):
    summed, weight = call.summed, call.weight
    needs_dx, needs_dresidual, needs_dweight = call.needed
    dx, dresidual = new_like(summed, needs_dx, call.x_dtype), new_like(summed, needs_dresidual)
    if summed.numel() == 0:
        return dx, dresidual, zeros(weight, weight.shape, needs_dweight)
    dweight = new_like(weight, needs_dweight, torch.float32)
    kernels.rms_norm_residual_backward(
        dy=strided_rows(call.dy),
        dsummed=strided_rows(call.dsummed),
        summed=strided_rows(summed),
        weight=vector(weight),
        rstd=call.rstd,
        dx=dx,
        dresidual=dresidual,
        dweight=dweight,
        unit_offset=call.unit_offset,
        x_dtype=call.x_dtype,
        dropout_p=call.dropout_p,
        seed=seed_value(call.seed),
        threads=cpu.threads(),
    )
    return dx, dresidual, dweight if dweight is None else dweight.to(weight.dtype)


implementation = Implementation(cpu.backend, forward, backward)
