"""linear_cross_entropy by the C++ kernel (csrc/cpu/linear_cross_entropy.h)."""

import torch

from fastlm.backends import cpu
from fastlm.backends.contract import Implementation
from fastlm.backends.cpu import kernels, new, new_like, vector, weight_grad_dtype, zeros
from fastlm.core.layout import rows, unit_stride_matrix
from fastlm.ops.linear_cross_entropy.reference import target_out_of_range
from fastlm.ops.linear_cross_entropy.spec import Forward

LOGITS_BYTES = 64 << 20  # of one chunk


def forward(call: Forward):
    x, weight, target = call.x, call.weight, call.target
    needs_dx, needs_dweight, needs_dbias = call.needed
    (vocab, width), dtype = weight.shape, weight_grad_dtype(x, call.fp32_grads)
    loss = new(x, target.shape, dtype=torch.float32)
    if x.numel() == 0:
        dweight, dbias = zeros(x, weight.shape, needs_dweight, dtype), zeros(x, vocab, needs_dbias, dtype)
        return loss, new(x, x.shape, needs_dx), dweight, dbias
    dx, count = new_like(x, needs_dx), x.numel() // width
    weight = unit_stride_matrix(weight)
    # Chunks of equal size: a small last one would read the whole weight for a few rows.
    chunk = -(-count // -(-count // max(1, LOGITS_BYTES // (4 * vocab))))
    logits, lse = new(x, (chunk, vocab), dtype=torch.float32), new(x, (count,), dtype=torch.float32)
    dweight, dbias = new_like(weight, needs_dweight, dtype), new(x, (vocab,), needs_dbias, dtype)
    # The products of several chunks are accumulated in float32.
    accumulates = needs_dweight and dtype != torch.float32 and chunk < count
    wrong = kernels.linear_cross_entropy_forward(
        x=rows(x),
        weight=weight,
        bias=vector(call.bias),
        target=target.reshape(-1),
        row_scale=vector(call.row_scale),
        loss=loss,
        lse=lse,
        logits=logits,
        dx=dx,
        dweight=dweight,
        dweight_sum=new(x, weight.shape, accumulates, torch.float32),
        dbias=dbias,
        ignore_index=call.ignore_index,
        label_smoothing=call.label_smoothing,
        logit_scale=call.logit_scale,
        softcap=call.softcap,
        threads=cpu.threads(),
    )
    if wrong >= 0:
        position = tuple(int(i) for i in torch.unravel_index(torch.tensor(wrong), target.shape))
        raise target_out_of_range(target, position, vocab, call.ignore_index)
    return loss, dx, dweight, dbias


implementation = Implementation(cpu.backend, forward)
