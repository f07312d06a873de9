"""layernorm_residual by the CUDA kernel (csrc/cuda/layernorm_residual.cu)."""

import torch

from fastlm.backends import cuda
from fastlm.backends.contract import Implementation
from fastlm.backends.gpu import new_like, on_device, vector
from fastlm.core.layout import rows
from fastlm.ops.layernorm_residual.spec import Backward, Forward


def forward(call: Forward):
    x = call.x
    y, summed = new_like(x), new_like(call.stream, call.makes_sum())
    mean = x.new_empty(tuple(x.shape[:-1]), dtype=torch.float32)  # PyTorch parses a tuple faster than a torch.Size
    rstd = torch.empty_like(mean)
    if x.numel():
        with on_device(x):
            device, stream = cuda.device_and_stream(x)
            cuda.kernels.layernorm_residual_forward(
                x=rows(x),
                residual=rows(call.residual),
                weight=vector(call.weight),
                bias=vector(call.bias),
                y=y,
                summed=summed,
                mean=mean,
                rstd=rstd,
                seed=call.seed,
                eps=call.eps,
                dropout_p=call.dropout_p,
                device=device,
                stream=stream,
            )
    return y, summed, mean, rstd


def backward(call: Backward):
    dy, summed, weight = call.dy, call.summed, call.weight
    needs_dx, needs_dresidual, needs_dweight, needs_dbias = call.needed
    dx, dresidual = new_like(summed, needs_dx, call.x_dtype), new_like(summed, needs_dresidual)
    dweight, dbias = new_like(weight, needs_dweight), new_like(weight, needs_dbias)
    if summed.numel() == 0 or dy is None:
        dweight, dbias = (d if d is None else d.zero_() for d in (dweight, dbias))
    if summed.numel():
        with on_device(summed):  # whose multiprocessors count
            partials = None
            if dy is not None and (needs_dweight or needs_dbias):
                padded_width = -(-weight.shape[0] // 8) * 8
                shape = needs_dweight + needs_dbias, cuda.kernels.layernorm_residual_max_partials(), padded_width
                partials = torch.empty(shape, dtype=torch.float32, device=summed.device)
            device, stream = cuda.device_and_stream(summed)
            cuda.kernels.layernorm_residual_backward(
                dy=rows(dy),
                dsummed=rows(call.dsummed),
                summed=rows(summed),
                weight=vector(weight),
                mean=call.mean,
                rstd=call.rstd,
                dx=dx,
                dresidual=dresidual,
                dweight=None if dy is None else dweight,
                dbias=None if dy is None else dbias,
                partials=partials,
                seed=call.seed,
                x_dtype=call.x_dtype,
                dropout_p=call.dropout_p,
                device=device,
                stream=stream,
            )
    return dx, dresidual, dweight, dbias


implementation = Implementation(cuda.backend, forward, backward)
