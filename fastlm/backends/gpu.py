"""What the backends triton and cuda share: the current device, results, and the form of arguments."""

import contextlib
import functools

import torch
from torch import Tensor

UNCHANGED = contextlib.nullcontext()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(x: Tensor):
    """A context in which x's device is current: kernels launch on the current device and its current stream."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return UNCHANGED


def new_like(x: Tensor, wanted: bool = True, dtype: torch.dtype | None = None):
    """An uninitialised contiguous tensor in x's shape; None if not wanted."""
    if not wanted:
        return None
    if dtype is None and x.is_contiguous():  # fewer arguments cost PyTorch less time to parse
        return torch.empty_like(x)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def dropout_arguments(p: float) -> tuple[int, float]:
    """(threshold, scale): an element is kept iff its random word is at least the threshold, and is then scaled."""
    return int(p * 2**32), 1 / (1 - p)


def vector(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None else parameter.contiguous()


@functools.cache
def num_processors(index: int | None) -> int | None:
    """The number of multiprocessors of a GPU; None without one."""
    return None if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def in_out_strides(weight: Tensor, layout: str) -> tuple[int, int]:
    """The strides of a weight along its input and its output."""
    n, k = weight.stride()
    return (k, n) if layout == "linear" else (n, k)


def precision(x: Tensor) -> str:
    """Of products: "ieee", or "tf32" if the user allowed PyTorch's own products less than full float32.

    16-bit operands are multiplied exactly either way.
    """
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    # set_float32_matmul_precision and allow_tf32 write this setting too, and "none" is full precision. Reading those
    # raises once the settings of products, of CUDA and of all differ.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
