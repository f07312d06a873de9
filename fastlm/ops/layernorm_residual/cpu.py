"""layernorm_residual by the C++ kernel (csrc/cpu/layernorm_residual.h)."""

import torch

from fastlm.backends import cpu
from fastlm.backends.contract import Implementation
from fastlm.backends.cpu import kernels, new, new_like, seed_value, vector, zeros
from fastlm.core.layout import rows
from fastlm.ops.layernorm_residual.spec import Backward, Forward


def forward(call: Forward):
    x = call.x
    y, summed = new_like(x), new_like(call.stream, call.makes_sum())
    mean = new(x, x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel():
        kernels.layernorm_residual_forward(
            x=rows(x),
            residual=rows(call.residual),
            weight=vector(call.weight),
            bias=vector(call.bias),
            y=y,
            summed=summed,
            mean=mean,
            rstd=rstd,
            eps=call.eps,
            dropout_p=call.dropout_p,
            seed=seed_value(call.seed),
            threads=cpu.threads(),
        )
    return y, summed, mean, rstd


def backward(call: Backward):
    summed, weight = call.summed, call.weight
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = call.needed
    dx, dresidual = new_like(summed, needs_dx, call.x_dtype), new_like(summed, needs_dresidual)
    if summed.numel() == 0:
        return dx, dresidual, zeros(weight, weight.shape, needs_dweight), zeros(weight, weight.shape, needs_dbias)
    dweight, dbias = (new_like(weight, needed, torch.float32) for needed in (needs_dweight, needs_dbias))
    kernels.layernorm_residual_backward(
        dy=rows(call.dy),
        dsummed=rows(call.dsummed),
        summed=rows(summed),
        weight=vector(weight),
        mean=call.mean,
        rstd=call.rstd,
        dx=dx,
        dresidual=dresidual,
        dweight=dweight,
        dbias=dbias,
        x_dtype=call.x_dtype,
        dropout_p=call.dropout_p,
        seed=seed_value(call.seed),
        threads=cpu.threads(),
    )
    return dx, dresidual, *(d if d is None else d.to(weight.dtype) for d in (dweight, dbias))


implementation = Implementation(cpu.backend, forward, backward)
