"""What the Triton and the CUDA C++ backend share: the device that a kernel runs on, memory for its results, and the form of its arguments."""

import contextlib
import functools

import torch

from fastlm.backends import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FURTHEST = 2**30  # positions and distances are 32-bit numbers in the kernels


def on(x):
    """Kernels launch on the device that is current, and on its current stream: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else contextlib.nullcontext()


def new_like(x, wanted=True, dtype=None):
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) if wanted else None


def dropout(p):
    """(threshold, scale): an element is kept iff its word is at least the one, and multiplied by the other."""
    return int(p * 2**32), 1 / (1 - p)


def vector(parameter):
    return parameter if parameter is None else parameter.contiguous()


@functools.cache
def processors(index):
    """How many programs a GPU runs at least at a time; None without one."""
    return None if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def by_layout(weight, layout):
    """The strides of a weight along its input and its output."""
    n, k = weight.stride()
    return (k, n) if layout == "linear" else (n, k)


def tokens_first(x, wanted=True):
    """Memory for a result like x, (B, H, T, D), that lies as (B, T, H, D): merging its heads is then a view."""
    if not wanted:
        return None
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def precision(x):
    """Of products: full float32 unless the user asked PyTorch for less. 16-bit operands are multiplied exactly."""
    if x.dtype != torch.float32 or torch.version.hip or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def clamped(lower, upper):
    return max(-FURTHEST, min(lower, FURTHEST)), max(-FURTHEST, min(upper, FURTHEST))


def packed(x):
    """(tokens, heads, head_dim) as a batch of one, (1, heads, tokens, head_dim)."""
    return x.transpose(0, 1)[None]


def check_starts(query, key, cu_seqlens_q, cu_seqlens_k):
    """On a CPU the values are looked at; on a GPU, where that would wait for it, the kernel asserts."""
    if query.is_cpu:
        reference.starts_of("cu_seqlens_q", cu_seqlens_q, query.shape[0])
        reference.starts_of("cu_seqlens_k", cu_seqlens_k, key.shape[0])
