"""How tensors lie in memory, for the backends that take addresses and strides. The only place that may copy, and it counts."""

import collections

import torch
from torch import Tensor

copies: collections.Counter[str] = collections.Counter()  # layouts that no stride describes: how often each was copied


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, width) with a contiguous last dimension. A view, except of layouts that no row stride can describe: those are copied."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if flat.data_ptr() != x.data_ptr() and x.numel():
        copies["rows of uneven stride"] += 1
    return dense_last(flat)


def rows_and_stride(x: Tensor) -> tuple[Tensor, int]:
    """What rows_of gives and its row stride; where x is contiguous, x itself, whose address and width say the same without making a view."""
    if x.is_contiguous():
        return x, x.shape[-1]
    flat = rows_of(x)
    return flat, flat.stride(0)


def rows_if(x: Tensor | None) -> tuple[Tensor | None, int]:
    """The same, where there is a tensor."""
    return (None, 0) if x is None else rows_and_stride(x)


def dense_last(x: Tensor) -> Tensor:
    """x with a contiguous last dimension."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    copies["strided last dimension"] += 1
    return x.contiguous()


def matrix_of(weight: Tensor) -> Tensor:
    """A weight matrix with one of its two strides 1, in whichever layout: both are views to the kernels."""
    if weight.stride(1) == 1 or weight.stride(0) == 1:
        return weight
    copies["weight with no unit stride"] += 1
    return weight.contiguous()


def without_gaps(x: Tensor) -> bool:
    """Whether the elements of x fill one piece of memory, each once, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """x with the strides of other, which is of the same shape and without gaps: then both can be walked through as flat memory."""
    if x.stride() == other.stride() or (x.is_contiguous() and other.is_contiguous()):
        return x
    copies["laid out otherwise than its parameter"] += 1
    return torch.empty_like(other, dtype=x.dtype, requires_grad=False).copy_(x)
