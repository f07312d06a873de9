"""layernorm_residual by the Triton kernel (kernels/layernorm_residual.py)."""

import torch

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import dropout_arguments, new_like, num_processors, on_device, vector
from fastlm.core.layout import rows_and_stride
from fastlm.kernels import layernorm_residual as kernels
from fastlm.kernels import residual_norm
from fastlm.kernels.plan import New, Plans, Workspace
from fastlm.ops.layernorm_residual.spec import Backward, Forward, Sizes

MAX_WIDTH = 16384  # a program holds a row in registers


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    if sizes.width > MAX_WIDTH:
        return [f"holds a row in registers: width up to {MAX_WIDTH}, not {sizes.width}"]
    return []


forwards, backwards = Plans(), Plans()


def forward(call: Forward):
    x, residual, weight, bias, seed, eps, dropout_p = call

    def compute(new: New):
        width = x.shape[-1]
        y, summed = new_like(x), new_like(call.stream, call.makes_sum())
        mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
        rstd = torch.empty_like(mean)
        if x.numel():
            kernels.layernorm_residual_forward(
                *rows_and_stride(x),
                *rows_and_stride(residual),
                vector(weight),
                vector(bias),
                y,
                summed,
                mean,
                rstd,
                seed,
                x.numel() // width,
                width,
                eps,
                *dropout_arguments(dropout_p),
                x.device.index,
            )
        return y, summed, mean, rstd

    with on_device(x):
        return forwards.call(x, call[:5], (eps, dropout_p), compute)


def backward(call: Backward):
    dy, dsummed, summed, weight, mean, rstd, seed, _, dropout_p, x_dtype, needed = call
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = needed

    def compute(new: New):
        dx, dresidual = new_like(summed, needs_dx, x_dtype), new_like(summed, needs_dresidual)
        dweight, dbias = new_like(weight, needs_dweight), new_like(weight, needs_dbias)
        if dy is None or summed.numel() == 0:
            dweight, dbias = (d if d is None else d.zero_() for d in (dweight, dbias))
        if summed.numel() == 0:
            return dx, dresidual, dweight, dbias
        width, device = weight.shape[0], summed.device.index
        rows = summed.numel() // width
        programs, tiles_per_program = residual_norm.partition(rows, width, seed is not None, num_processors(device))
        partials = None
        if dy is not None and (needs_dweight or needs_dbias):
            partials = new((needs_dweight + needs_dbias, programs, width))
        kernels.layernorm_residual_backward(
            *rows_and_stride(dy),
            *rows_and_stride(dsummed),
            *rows_and_stride(summed),
            vector(weight),
            mean,
            rstd,
            dx,
            dresidual,
            partials[0] if partials is not None and needs_dweight else None,
            partials[-1] if partials is not None and needs_dbias else None,
            seed,
            rows,
            width,
            programs,
            tiles_per_program,
            *dropout_arguments(dropout_p),
            device,
        )
        if partials is not None:
            residual_norm.reduce_partials(partials, dweight, dbias, programs, width, device)
        return dx, dresidual, dweight, dbias

    with on_device(summed):
        if dy is None:  # zeros are no launch of ours
            return compute(Workspace(summed).part)
        return backwards.call(summed, call[:7], (dropout_p, x_dtype, *needed), compute)


implementation = Implementation(triton.backend, forward, backward, refuses)
