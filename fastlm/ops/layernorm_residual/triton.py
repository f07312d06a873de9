"""layernorm_residual by the Triton kernel (kernels/layernorm_residual.py)."""

import torch

from fastlm.backends import triton
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import dropout_arguments, new_like, on_device, vector
from fastlm.core.layout import rows_and_stride
from fastlm.kernels import layernorm_residual as kernels
from fastlm.kernels import residual_norm
from fastlm.ops.layernorm_residual.spec import Backward, Forward, Sizes

MAX_WIDTH = 16384  # a program holds a row in registers


def refuses(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[str]:
    if sizes.width > MAX_WIDTH:
        return [f"holds a row in registers: width up to {MAX_WIDTH}, not {sizes.width}"]
    return []


def forward(call: Forward):
    x = call.x
    y, summed = new_like(x), new_like(call.stream, call.makes_sum())
    mean = x.new_empty(tuple(x.shape[:-1]), dtype=torch.float32)  # PyTorch parses a tuple faster than a torch.Size
    rstd = torch.empty_like(mean)
    if x.numel():
        width = x.shape[-1]
        with on_device(x):
            kernels.layernorm_residual_forward(
                *rows_and_stride(x),
                *rows_and_stride(call.residual),
                vector(call.weight),
                vector(call.bias),
                y,
                summed,
                mean,
                rstd,
                call.seed,
                x.numel() // width,
                width,
                call.eps,
                *dropout_arguments(call.dropout_p),
                x.device.index,
            )
    return y, summed, mean, rstd


def backward(call: Backward):
    dy, summed, weight, seed = call.dy, call.summed, call.weight, call.seed
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = call.needed
    width = weight.shape[0]
    dx, dresidual = new_like(summed, needs_dx, call.x_dtype), new_like(summed, needs_dresidual)
    dweight, dbias = new_like(weight, needs_dweight), new_like(weight, needs_dbias)
    if summed.numel() == 0 or dy is None:
        dweight, dbias = (d if d is None else d.zero_() for d in (dweight, dbias))
    if summed.numel():
        rows, device = summed.numel() // width, summed.device.index
        reduces = dy is not None and (needs_dweight or needs_dbias)
        programs, tiles_per_program = residual_norm.partition(rows, width, seed is not None)
        partials = None
        if reduces:
            partials = summed.new_empty((needs_dweight + needs_dbias, programs, width), dtype=torch.float32)
        with on_device(summed):
            kernels.layernorm_residual_backward(
                *rows_and_stride(dy),
                *rows_and_stride(call.dsummed),
                *rows_and_stride(summed),
                vector(weight),
                call.mean,
                call.rstd,
                dx,
                dresidual,
                partials[0] if reduces and needs_dweight else None,
                partials[-1] if reduces and needs_dbias else None,
                seed,
                rows,
                width,
                programs,
                tiles_per_program,
                *dropout_arguments(call.dropout_p),
                device,
            )
            if reduces:
                residual_norm.reduce_partials(partials, dweight, dbias, programs, width, device)
    return dx, dresidual, dweight, dbias


implementation = Implementation(triton.backend, forward, backward, refuses)
