"""Chunks of logits on triton and cuda: the vendor's GEMMs, around kernels that replace logits by their gradient.

linear_log_prob uses them too.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastlm.ops.linear_cross_entropy import torch as native
from fastlm.ops.linear_cross_entropy.spec import Forward

# Rows of logits are aligned to this many bytes whatever the vocabulary (50257 is odd): vector loads and the vendor's
# GEMM want it.
ROW_ALIGNMENT = 128


def chunk_of(rows: int, most: int) -> int:
    """The rows of a chunk of at most so many: chunks of one size, in multiples of 256, whole tiles of a product.

    With multiples of 16 rows the targets and results of every chunk are aligned alike: Triton compiles one kernel.
    """
    if rows <= most:
        return rows
    unit = 256 if most >= 256 else 16 if most >= 16 else 1
    chunks = -(-rows // (max(1, most) // unit * unit))
    return -(-rows // (chunks * unit)) * unit


@functools.cache
def logits_bytes(index: int | None) -> int:
    """The memory of a chunk of logits: a 64th of that of the GPU, from 64 to 512 MiB; 64 MiB on a CPU.

    With small chunks the additions to the gradient of the weight would take longer than the products.
    """
    if index is None:
        return 64 << 20
    return max(64 << 20, min(torch.cuda.get_device_properties(index).total_memory // 64, 512 << 20))


@functools.cache
def accumulates_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the vendor's product of 16-bit matrices adds to a float32 matrix, which depends on PyTorch's version."""
    if device.type != "cuda":
        return False
    a, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def add_product(total: Tensor | None, a: Tensor, b: Tensor, last: bool) -> Tensor:
    """total + a @ b. 16-bit products of several chunks are accumulated in float32, by the vendor's product itself if
    possible, and rounded after the last.
    """
    if (total is None and last) or a.dtype == torch.float32 or not accumulates_in_float32(a.device, a.dtype):
        return native.add_product(total, a, b, last)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    total = torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.to(a.dtype) if last else total


def rows_of(x: Tensor, at: slice) -> Tensor:
    """x[at], in a sixth of the time where that is all of x."""
    return x if at.start == 0 and at.stop == x.shape[0] else x[at]


def chunks_of_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, chunk_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """(rows of x, their logits x Wᵀ + bias in the dtype of x). The next chunk overwrites the logits of the last."""
    rows, vocab, alignment = x.shape[0], weight.shape[0], ROW_ALIGNMENT // x.element_size()
    stride = -(-vocab // alignment) * alignment
    chunk = chunk_of(rows, chunk_bytes // (stride * x.element_size()))
    # On a CPU oneDNN multiplies what lies between the rows by 0: it must not be NaN.
    memory = x.new_empty(chunk, stride) if x.is_cuda else x.new_zeros(chunk, stride)
    for begin in range(0, rows, max(1, chunk)):
        at = slice(begin, min(begin + chunk, rows))
        logits = rows_of(memory, slice(0, at.stop - begin))
        logits = logits if vocab == stride else logits[:, :vocab]
        if bias is None:
            torch.mm(rows_of(x, at), weight.t(), out=logits)
        else:
            torch.addmm(bias, rows_of(x, at), weight.t(), out=logits)
        yield at, logits


def gradients_of_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needed: tuple[bool, ...],
    chunk_bytes: int,
    num_partials: Callable[[int], int],
    gradient: Callable[[slice, Tensor, Tensor | None], None],
):
    """The needed gradients of x (rows, width), weight and bias.

    gradient(rows, logits, partials) overwrites the logits of these rows by their gradient. Where the gradient of the
    bias is needed it also writes num_partials(count) partial sums of it in float32.
    """
    needs_dx, needs_dweight, needs_dbias = needed
    rows, vocab = x.shape[0], weight.shape[0]
    dx = x.new_empty(x.shape) if needs_dx else None
    dweight = None if rows else torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dbias = x.new_zeros(vocab, dtype=torch.float32) if needs_dbias else None
    for at, logits in chunks_of_logits(x, weight, bias, chunk_bytes):
        partials = None
        if dbias is not None:
            partials = dbias.new_empty(num_partials(logits.shape[0]), vocab)
        gradient(at, logits, partials)
        if dbias is not None:
            dbias += partials.sum(0)
        if dx is not None:
            torch.mm(logits, weight, out=rows_of(dx, at))
        if needs_dweight:
            dweight = add_product(dweight, logits.t(), rows_of(x, at), at.stop == rows)
    return dx, dweight if needs_dweight else None, dbias if dbias is None else dbias.to(x.dtype)


def row_scales(call: Forward) -> Tensor | None:
    """The row_scale of a call as (rows,); None where no gradient is needed."""
    return call.row_scale.reshape(-1).contiguous() if any(call.needed) and call.row_scale is not None else None


def workspace(logits: Tensor, partials: Tensor | None) -> Tensor | None:
    """(2, rows or a few more) for the statistics of the rows, which the pass by columns for partials reads."""
    return None if partials is None else partials.new_empty(2, -(-logits.shape[0] // 4) * 4)
