"""rms_norm_residual by the Triton kernel (kernels/rms_norm_residual.py)."""

import torch

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import dropout_arguments, new_like, num_processors, on_device, vector
from fastlm.core.layout import row_strides
from fastlm.kernels import residual_norm
from fastlm.kernels import rms_norm_residual as kernels
from fastlm.kernels.plan import New, Plans, Workspace
from fastlm.ops.rms_norm_residual.spec import Backward, Forward, Sizes

MAX_WIDTH = 16384  # a program holds a row in registers
MAX_ROWS = 2**31 - 2**16  # indices of rows have 32 bits, the last tile included


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = []
    if sizes.width > MAX_WIDTH:
        reasons.append(f"holds a row in registers: width up to {MAX_WIDTH}, not {sizes.width}")
    if sizes.rows > MAX_ROWS:
        reasons.append(f"numbers rows in 32 bits: up to {MAX_ROWS}, not {sizes.rows}")
    return reasons


forwards, backwards = Plans(), Plans()


def forward(call: Forward):
    x, residual, weight, seed, eps, dropout_p, unit_offset = call

    def compute(new: New):
        y, summed = new_like(x), new_like(call.stream, call.makes_sum())
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        if x.numel():
            width = x.shape[-1]
            sizes, rows = row_strides(x, residual)
            kernels.rms_norm_residual_forward(
                *rows,
                vector(weight),
                y,
                summed,
                rstd,
                seed,
                x.numel() // width,
                width,
                sizes,
                eps,
                *dropout_arguments(dropout_p),
                unit_offset,
                x.device.index,
            )
        return y, summed, rstd

    with on_device(x):
        return forwards.call(x, call[:4], (eps, dropout_p, unit_offset), compute)


def backward(call: Backward):
    dy, dsummed, summed, weight, rstd, seed, _, dropout_p, unit_offset, x_dtype, needed = call
    needs_dx, needs_dresidual, needs_dweight = needed

    def compute(new: New):
        dx, dresidual = new_like(summed, needs_dx, x_dtype), new_like(summed, needs_dresidual)
        dweight = new_like(weight, needs_dweight)
        if needs_dweight and (summed.numel() == 0 or dy is None):
            dweight.zero_()
        if summed.numel() == 0:
            return dx, dresidual, dweight
        width, device = weight.shape[0], summed.device.index
        rows = summed.numel() // width
        programs, tiles_per_program = residual_norm.partition(rows, width, seed is not None, num_processors(device))
        partials = new((1, programs, width)) if dy is not None and needs_dweight else None
        sizes, strided = row_strides(dy, dsummed, summed)
        kernels.rms_norm_residual_backward(
            *strided,
            vector(weight),
            rstd,
            dx,
            dresidual,
            partials,
            seed,
            rows,
            width,
            sizes,
            programs,
            tiles_per_program,
            *dropout_arguments(dropout_p),
            unit_offset,
            device,
        )
        if partials is not None:
            residual_norm.reduce_partials(partials, dweight, None, programs, width, device)
        return dx, dresidual, dweight

    with on_device(summed):
        if dy is None:  # zeros are no launch of ours
            return compute(Workspace(summed).part)
        return backwards.call(summed, call[:6], (dropout_p, unit_offset, x_dtype, *needed), compute)


implementation = Implementation(triton.backend, forward, backward, refuses)
