"""glu_mlp by the C++ kernel (csrc/cpu/glu_mlp.h)."""

from fastlm.backends import cpu
from fastlm.backends.contract import Implementation
from fastlm.backends.cpu import kernels, new, vector, weight_grad_dtype, zeros
from fastlm.core.layout import rows, unit_stride_matrix
from fastlm.ops.activation import NUMBERS
from fastlm.ops.glu_mlp.spec import Backward, Forward


def forward(call: Forward):
    x, shape, saves = call.x, call.hidden_shape, call.recompute < 2
    y = new(x, (*x.shape[:-1], call.w_down.shape[0]))
    gate, up, activated = new(x, shape, saves), new(x, shape, saves), new(x, shape)
    if x.numel():
        kernels.glu_mlp_forward(
            x=rows(x),
            w_gate=unit_stride_matrix(call.w_gate),
            w_up=unit_stride_matrix(call.w_up),
            w_down=unit_stride_matrix(call.w_down),
            b_gate=vector(call.b_gate),
            b_up=vector(call.b_up),
            b_down=vector(call.b_down),
            gate=gate,
            up=up,
            activated=activated,
            y=y,
            activation=NUMBERS[call.activation],
            threads=cpu.threads(),
        )
    return y, gate, up, activated if call.recompute < 1 else None


def backward(call: Backward):
    x, weight_dtype = call.x, weight_grad_dtype(call.x, call.fp32_grads)
    results = tuple(zip(call.shapes, call.needed, (x.dtype, *(weight_dtype,) * 6), strict=True))
    if x.numel() == 0:
        return tuple(zeros(x, *result) for result in results)
    dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down = (new(x, *result) for result in results)
    shape, known = call.hidden_shape, call.gate is not None
    gate, up = (call.gate, call.up) if known else (new(x, shape), new(x, shape))
    # What was recomputed is overwritten by its gradient.
    dgate, dup = (new(x, shape), new(x, shape)) if known else (gate, up)
    kernels.glu_mlp_backward(
        x=rows(x),
        w_gate=unit_stride_matrix(call.w_gate),
        w_up=unit_stride_matrix(call.w_up),
        w_down=unit_stride_matrix(call.w_down),
        b_gate=vector(call.b_gate),
        b_up=vector(call.b_up),
        dy=rows(call.dy),
        gate=gate,
        up=up,
        hidden_known=known,
        activated=new(x, shape) if call.activated is None else call.activated,
        activated_known=call.activated is not None,
        dgate=dgate,
        dup=dup,
        dx=dx,
        dw_gate=dw_gate,
        dw_up=dw_up,
        dw_down=dw_down,
        db_gate=db_gate,
        db_up=db_up,
        db_down=db_down,
        activation=NUMBERS[call.activation],
        threads=cpu.threads(),
    )
    return dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down


implementation = Implementation(cpu.backend, forward, backward)
