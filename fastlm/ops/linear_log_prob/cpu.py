"""linear_log_prob by the C++ kernel (csrc/cpu/linear_log_prob.h)."""

import torch

from fastlm.backends import cpu
from fastlm.backends.contract import Implementation
from fastlm.backends.cpu import kernels, new, new_like, vector, weight_grad_dtype, zeros
from fastlm.core.layout import rows, unit_stride_matrix
from fastlm.ops.linear_cross_entropy.reference import target_out_of_range
from fastlm.ops.linear_log_prob.spec import Backward, Forward

LOGITS_BYTES = 64 << 20  # of one chunk


def arguments(call: Forward | Backward):
    """What both kernels take. Chunks have equal sizes: a small last one would read the whole weight for a few rows."""
    x, vocab = call.x, call.weight.shape[0]
    count = x.numel() // x.shape[-1]
    chunk = -(-count // -(-count // max(1, LOGITS_BYTES // (4 * vocab))))
    return {
        "x": rows(x),
        "weight": unit_stride_matrix(call.weight),
        "bias": vector(call.bias),
        "target": call.target.reshape(-1),
        "logits": new(x, (chunk, vocab), dtype=torch.float32),
        "ignore_index": call.ignore_index,
        "temperature": call.temperature,
        "softcap": call.softcap,
        "threads": cpu.threads(),
    }


def forward(call: Forward):
    log_prob, entropy, row_max, row_sum = (new(call.x, call.target.shape, dtype=torch.float32) for _ in range(4))
    results = {"log_prob": log_prob, "entropy": entropy, "row_max": row_max, "row_sum": row_sum}
    if call.x.numel():
        wrong = kernels.linear_log_prob_forward(**arguments(call), **results)
        if wrong >= 0:
            position = tuple(int(i) for i in torch.unravel_index(torch.tensor(wrong), call.target.shape))
            raise target_out_of_range(call.target, position, call.weight.shape[0], call.ignore_index)
    return tuple(results.values())


def backward(call: Backward):
    x, weight = call.x, call.weight
    needs_dx, needs_dweight, needs_dbias = call.needed
    vocab, dtype = weight.shape[0], weight_grad_dtype(x, call.fp32_grads)
    if x.numel() == 0:
        return new(x, x.shape, needs_dx), *(
            zeros(x, shape, need, dtype) for shape, need in ((weight.shape, needs_dweight), (vocab, needs_dbias))
        )
    given = arguments(call)
    dx, dweight, dbias = (
        new_like(x, needs_dx),
        new_like(weight, needs_dweight, dtype),
        new(x, (vocab,), needs_dbias, dtype),
    )
    # The products of several chunks are accumulated in float32.
    accumulates = needs_dweight and dtype != torch.float32 and given["logits"].shape[0] < x.numel() // x.shape[-1]
    kernels.linear_log_prob_backward(
        **given,
        dlog_prob=vector(call.dlog_prob),
        dentropy=vector(call.dentropy),
        entropy=vector(call.entropy),
        row_max=vector(call.row_max),
        row_sum=vector(call.row_sum),
        dx=dx,
        dweight=dweight,
        dweight_sum=new(x, weight.shape, accumulates, torch.float32),
        dbias=dbias,
    )
    return dx, dweight, dbias


implementation = Implementation(cpu.backend, forward, backward)
