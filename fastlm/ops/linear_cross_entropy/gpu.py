"""What triton and cuda share: the vendor's GEMMs around a kernel that turns a chunk of logits into its gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.ops.linear_cross_entropy.spec import Forward
from fastlm.ops.linear_cross_entropy.torch import add_product

# Rows of logits are aligned to this many bytes whatever the vocabulary (50257 is odd): vector loads and the vendor's
# GEMM want it.
ROW_ALIGNMENT = 128


def losses_and_gradients(
    call: Forward,
    x: Tensor,
    targets: Tensor,
    loss: Tensor,
    chunk_bytes: int,
    num_partials: Callable[[int], int],
    gradient: Callable[..., None],
):
    """Fill loss (rows,) and return the needed gradients of x (rows, width), weight and bias.

    gradient(logits, targets, row_scale, loss, statistics, partials) overwrites a chunk of logits by its gradient. Where
    the gradient of the bias is needed it also writes num_partials(rows) partial sums of it, with statistics
    (2, rows or a few more) as workspace.
    """
    weight, bias, needed = call.weight, call.bias, call.needed
    needs_dx, needs_dweight, needs_dbias = needed
    row_scale = call.row_scale.reshape(-1).contiguous() if any(needed) and call.row_scale is not None else None
    rows, vocab, alignment = x.shape[0], weight.shape[0], ROW_ALIGNMENT // x.element_size()
    stride = -(-vocab // alignment) * alignment
    dx = x.new_empty(x.shape) if needs_dx else None
    dweight = None if rows else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dbias = loss.new_zeros(vocab) if needs_dbias else None
    chunk = max(1, chunk_bytes // (stride * x.element_size()))
    # With multiples of 16 rows the targets and losses of every chunk are aligned alike: Triton compiles one kernel.
    chunk = min(rows, chunk // 16 * 16 or chunk)
    memory = x.new_empty(chunk, stride)
    for begin in range(0, rows, max(1, chunk)):
        x_chunk, target, result = (t[begin : begin + chunk] for t in (x, targets, loss))
        scale = None if row_scale is None else row_scale[begin : begin + chunk]
        count = x_chunk.shape[0]
        logits = memory[:count, :vocab]
        if bias is None:
            torch.mm(x_chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, x_chunk, weight.t(), out=logits)
        statistics = partials = None
        if dbias is not None:
            statistics, partials = loss.new_empty(2, -(-count // 4) * 4), loss.new_empty(num_partials(count), vocab)
        gradient(logits, target, scale, result, statistics, partials)
        if dbias is not None:
            dbias += partials.sum(0)
        if dx is not None:
            torch.mm(logits, weight, out=dx[begin : begin + chunk])
        if needs_dweight:
            dweight = add_product(dweight, logits.t(), x_chunk, begin + chunk >= rows)
    return dx, dweight if needs_dweight else None, dbias if dbias is None else dbias.to(x.dtype)
