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


def strided_rows(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension and at most three leading dimensions, for kernels that take their strides.

    Contiguous tensors may have any number of dimensions. None stays None.
    """
    if x is None or x.is_contiguous():
        return x
    return as_rows(x) if x.dim() > 4 else contiguous_last(x)


Rows = tuple[Tensor | None, int, int, int]  # a tensor, and the strides of the outer, middle and inner index of a row


def row_strides(*tensors: Tensor | None) -> tuple[tuple[int, int], list[Rows]]:
    """Tensors of one shape as rows: the sizes (middle, inner), and Rows of each tensor.

    Row (outer · middle + m) · inner + i begins at the sum of index · stride. If all tensors are contiguous, the inner
    and the middle size are 1, so that no index is divided. None stays None, with strides of 0.
    """
    given = [strided_rows(x) for x in tensors]
    shapes = {x.shape[:-1] for x in given if x is not None}
    if len(shapes) > 1:  # one of more than three leading dimensions was copied or merged
        given = [x if x is None else as_rows(x) for x in given]
    if all(x is None or x.is_contiguous() for x in given):
        return (1, 1), [(x, 0 if x is None else x.shape[-1], 0, 0) for x in given]
    leading = next(x.shape[:-1] for x in given if x is not None)
    _, middle, inner = (*leading, 1, 1)[:3]
    return (middle, inner), [(x, *(leading_strides(x))) for x in given]


def leading_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of up to three leading dimensions, the missing ones last."""
    outer, middle, inner = (0, 0, 0) if x is None else (*x.stride()[:-1], 0, 0)[:3]
    return outer, middle, inner


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
