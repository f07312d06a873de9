"""gelu_mlp by the C++ kernel (csrc/cpu/gelu_mlp.h)."""

from fastlm.backends import cpu
from fastlm.backends.contract import Implementation
from fastlm.backends.cpu import kernels, new, vector, weight_grad_dtype, zeros
from fastlm.core.layout import rows, unit_stride_matrix
from fastlm.ops.gelu_mlp.spec import Backward, Forward
from fastlm.ops.linear.spec import out_width


def forward(call: Forward):
    x, shape = call.x, call.hidden_shape
    y = new(x, (*x.shape[:-1], out_width(call.w2, call.layout)))
    hidden, activated = new(x, shape, call.recompute < 2), new(x, shape)
    if x.numel():
        kernels.gelu_mlp_forward(
            x=rows(x),
            w1=unit_stride_matrix(call.w1),
            b1=vector(call.b1),
            w2=unit_stride_matrix(call.w2),
            b2=vector(call.b2),
            hidden=hidden,
            activated=activated,
            y=y,
            conv1d=call.conv1d,
            tanh=call.tanh,
            threads=cpu.threads(),
        )
    return y, hidden, activated if call.recompute < 1 else None


def backward(call: Backward):
    x, weight_dtype = call.x, weight_grad_dtype(call.x, call.fp32_grads)
    results = tuple(zip(call.shapes, call.needed, (x.dtype, *(weight_dtype,) * 4), strict=True))
    if x.numel() == 0:
        return tuple(zeros(x, *result) for result in results)
    dx, dw1, db1, dw2, db2 = (new(x, *result) for result in results)
    shape = x.numel() // x.shape[-1], out_width(call.w1, call.layout)
    kernels.gelu_mlp_backward(
        dy=rows(call.dy),
        x=rows(x),
        w1=unit_stride_matrix(call.w1),
        b1=vector(call.b1),
        w2=unit_stride_matrix(call.w2),
        hidden=new(x, shape) if call.hidden is None else call.hidden,
        hidden_known=call.hidden is not None,
        activated=new(x, shape) if call.activated is None else call.activated,
        activated_known=call.activated is not None,
        dhidden=new(x, shape),
        dx=dx,
        dw1=dw1,
        db1=db1,
        dw2=dw2,
        db2=db2,
        conv1d=call.conv1d,
        tanh=call.tanh,
        threads=cpu.threads(),
    )
    return dx, dw1, db1, dw2, db2


implementation = Implementation(cpu.backend, forward, backward)
