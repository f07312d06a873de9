"""linear by the C++ kernel (csrc/cpu/linear.h)."""

from fastlm.backends import cpu
from fastlm.backends.contract import Implementation
from fastlm.backends.cpu import kernels, new, new_like, vector, weight_grad_dtype, zeros
from fastlm.core.layout import rows, unit_stride_matrix
from fastlm.ops.linear.spec import Backward, Forward, out_width


def forward(call: Forward):
    x = call.x
    y = new(x, (*x.shape[:-1], out_width(call.weight, call.layout)))
    if x.numel():
        kernels.linear_forward(
            x=rows(x),
            weight=unit_stride_matrix(call.weight),
            bias=vector(call.bias),
            y=y,
            conv1d=call.conv1d,
            threads=cpu.threads(),
        )
    return (y,)


def backward(call: Backward):
    x, weight = call.x, call.weight
    needs_dx, needs_dweight, needs_dbias = call.needed
    n, dtype = out_width(weight, call.layout), weight_grad_dtype(x, call.fp32_grads)
    if x.numel() == 0:
        return new(x, x.shape, needs_dx), zeros(x, weight.shape, needs_dweight, dtype), zeros(x, n, needs_dbias, dtype)
    dx, dweight, dbias = new_like(x, needs_dx), new_like(weight, needs_dweight, dtype), new(x, (n,), needs_dbias, dtype)
    kernels.linear_backward(
        dy=rows(call.dy),
        x=rows(x),
        weight=unit_stride_matrix(weight),
        dx=dx,
        dweight=dweight,
        dbias=dbias,
        conv1d=call.conv1d,
        threads=cpu.threads(),
    )
    return dx, dweight, dbias


implementation = Implementation(cpu.backend, forward, backward)
