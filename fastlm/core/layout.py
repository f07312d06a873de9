"""The memory layout of tensors, for the backends whose kernels take strides. The only place that copies, and it counts.

fastlm.info().copies shows how often each layout was copied.
"""

import collections

import torch
from torch import Tensor

copies: collections.Counter[str] = collections.Counter()  # layout that no stride describes → copies made


def as_rows(x: Tensor) -> Tensor:
    """x as (rows, width) with a contiguous last dimension: a view unless no row stride describes the layout."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if flat.data_ptr() != x.data_ptr() and x.numel():
        copies["rows with unequal strides"] += 1
    return contiguous_last(flat)


def rows(x: Tensor | None) -> Tensor | None:
    """x itself where it is contiguous, which saves making a view; otherwise as_rows(x). None stays None."""
    return x if x is None or x.is_contiguous() else as_rows(x)


def rows_and_stride(x: Tensor | None) -> tuple[Tensor | None, int]:
    """rows(x) and its row stride; (None, 0) for None."""
    if x is None:
        return None, 0
    if x.is_contiguous():
        return x, x.shape[-1]
    flat = as_rows(x)
    return flat, flat.stride(0)


def contiguous_last(x: Tensor) -> Tensor:
    """x with a contiguous last dimension."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    copies["strided last dimension"] += 1
    return x.contiguous()


def unit_stride_matrix(weight: Tensor) -> Tensor:
    """A weight matrix with a unit stride in one of its dimensions: the kernels take either."""
    if weight.stride(1) == 1 or weight.stride(0) == 1:
        return weight
    copies["weight with no unit stride"] += 1
    return weight.contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether the elements of x fill one block of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def with_strides_of(x: Tensor, other: Tensor) -> Tensor:
    """x with the strides of other, a dense tensor of the same shape, so that both can be walked as flat memory."""
    if x.stride() == other.stride() or (x.is_contiguous() and other.is_contiguous()):
        return x
    copies["strides unlike its parameter's"] += 1
    return torch.empty_like(other, dtype=x.dtype, requires_grad=False).copy_(x)
