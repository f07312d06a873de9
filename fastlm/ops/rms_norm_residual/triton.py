"""rms_norm_residual by the Triton kernel (kernels/rms_norm_residual.py)."""

import torch

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import dropout_arguments, new_like, on_device, vector
from fastlm.core.layout import row_strides
from fastlm.kernels import residual_norm
from fastlm.kernels import rms_norm_residual as kernels
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


def forward(call: Forward):
    x = call.x
    y, summed = new_like(x), new_like(call.stream, call.makes_sum())
    rstd = x.new_empty(tuple(x.shape[:-1]), dtype=torch.float32)  # PyTorch parses a tuple faster than a torch.Size
    if x.numel():
        width = x.shape[-1]
        sizes, rows = row_strides(x, call.residual)
        with on_device(x):
            kernels.rms_norm_residual_forward(
                *rows,
                vector(call.weight),
                y,
                summed,
                rstd,
                call.seed,
                x.numel() // width,
                width,
                sizes,
                call.eps,
                *dropout_arguments(call.dropout_p),
                call.unit_offset,
                x.device.index,
            )
    return y, summed, rstd


def backward(call: Backward):
    dy, summed, weight, seed = call.dy, call.summed, call.weight, call.seed
    needs_dx, needs_dresidual, needs_dweight = call.needed
    width = weight.shape[0]
    dx, dresidual = new_like(summed, needs_dx, call.x_dtype), new_like(summed, needs_dresidual)
    dweight = new_like(weight, needs_dweight)
    if needs_dweight and (summed.numel() == 0 or dy is None):
        dweight.zero_()
    if summed.numel():
        rows, device = summed.numel() // width, summed.device.index
        reduces = dy is not None and needs_dweight
        programs, tiles_per_program = residual_norm.partition(rows, width, seed is not None)
        partials = summed.new_empty((1, programs, width), dtype=torch.float32) if reduces else None
        sizes, strided = row_strides(dy, call.dsummed, summed)
        with on_device(summed):
            kernels.rms_norm_residual_backward(
                *strided,
                vector(weight),
                call.rstd,
                dx,
                dresidual,
                partials,
                seed,
                rows,
                width,
                sizes,
                programs,
                tiles_per_program,
                *dropout_arguments(call.dropout_p),
                call.unit_offset,
                device,
            )
            if reduces:
                residual_norm.reduce_partials(partials, dweight, None, programs, width, device)
    return dx, dresidual, dweight


implementation = Implementation(triton.backend, forward, backward, refuses)
