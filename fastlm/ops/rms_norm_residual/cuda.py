"""rms_norm_residual by the CUDA kernel (csrc/cuda/rms_norm_residual.cu)."""

import torch

from fastlm.backends import cuda
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import new_like, on_device, vector
from fastlm.core.layout import strided_rows
from fastlm.ops.rms_norm_residual.spec import Backward, Forward


def forward(call: Forward):
    x = call.x
    y, summed = new_like(x), new_like(call.stream, call.makes_sum())
    rstd = x.new_empty(tuple(x.shape[:-1]), dtype=torch.float32)  # PyTorch parses a tuple faster than a torch.Size
    if x.numel():
        with on_device(x):
            device, stream = cuda.device_and_stream(x)
            cuda.kernels.rms_norm_residual_forward(
                x=strided_rows(x),
                residual=strided_rows(call.residual),
                weight=vector(call.weight),
                y=y,
                summed=summed,
                rstd=rstd,
                seed=call.seed,
                eps=call.eps,
                unit_offset=call.unit_offset,
                dropout_p=call.dropout_p,
                device=device,
                stream=stream,
            )
    return y, summed, rstd


def backward(call: Backward):
    dy, summed, weight = call.dy, call.summed, call.weight
    needs_dx, needs_dresidual, needs_dweight = call.needed
    dx, dresidual = new_like(summed, needs_dx, call.x_dtype), new_like(summed, needs_dresidual)
    dweight = new_like(weight, needs_dweight)
    if needs_dweight and (summed.numel() == 0 or dy is None):
        dweight.zero_()
    if summed.numel():
        with on_device(summed):  # whose multiprocessors count
            partials = None
            if dy is not None and needs_dweight:
                shape = cuda.kernels.rms_norm_residual_max_partials(), -(-weight.shape[0] // 8) * 8
                partials = torch.empty(shape, dtype=torch.float32, device=summed.device)
            device, stream = cuda.device_and_stream(summed)
            cuda.kernels.rms_norm_residual_backward(
                dy=strided_rows(dy),
                dsummed=strided_rows(call.dsummed),
                summed=strided_rows(summed),
                weight=vector(weight),
                rstd=call.rstd,
                dx=dx,
                dresidual=dresidual,
                dweight=None if dy is None else dweight,
                partials=partials,
                seed=call.seed,
                unit_offset=call.unit_offset,
                x_dtype=call.x_dtype,
                dropout_p=call.dropout_p,
                device=device,
                stream=stream,
            )
    return dx, dresidual, dweight


implementation = Implementation(cuda.backend, forward, backward)
