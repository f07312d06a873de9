"""The backend `cpu`: the C++ kernels of the compiled module that isa.py selected.

A kernel takes tensors and numbers by keyword; the module reads addresses, sizes and strides and checks dtype and rank.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.backends import isa
from fastlm.core.errors import check_storage
from fastlm.core.huge_pages import on_huge_pages

kernels: Any = isa.kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

threads = torch.get_num_threads


def one_thread() -> int:
    return 1


def after_fork() -> None:
    """libgomp cannot start threads in a forked child whose parent had some."""
    global threads
    threads = one_thread


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=after_fork)


class Cpu:
    name = "cpu"
    description = "C++ kernels for the CPU's instruction set"

    def unavailable(self) -> list[str]:
        if isa.wrong_isa:
            return [f"is not loaded: {isa.wrong_isa}"]
        return [] if kernels else [f"is not compiled here: {isa.missing}"]

    def refuses(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        reasons = []
        if device.type != "cpu":
            reasons.append(f"supports CPU tensors, not {device}")
        if dtype not in DTYPES:
            reasons.append(f"computes in {', '.join(map(str, DTYPES))}, not {dtype}")
        return reasons


backend = Cpu()


def check_each_storage(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> None:
    """check_storage of each tensor, as the compiled function of that name does it in a tenth of the time."""
    for name, x in zip(names, tensors, strict=True):
        if x is not None:
            check_storage(name, x)


check_storages: Callable[[tuple[str, ...], tuple[Tensor | None, ...]], None]
check_storages = kernels.check_storage if kernels else check_each_storage


def new(x: Tensor, shape: Sequence[int], wanted: bool = True, dtype: torch.dtype | None = None):
    """An uninitialised tensor on x's device, in x's dtype unless one is given; None if not wanted."""
    if not wanted:
        return None
    # PyTorch parses sizes that are separate arguments in two thirds of the time of a tuple. A scalar has none.
    return on_huge_pages(x.new_empty(*shape, dtype=dtype) if shape else x.new_empty((), dtype=dtype))


def new_like(x: Any, wanted: bool = True, dtype: torch.dtype | None = None):
    """The same in x's shape, contiguous; it costs half of what new_empty does."""
    if not wanted:
        return None
    return on_huge_pages(torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format))


def zeros(x: Tensor, shape, wanted: bool = True, dtype: torch.dtype | None = None):
    return x.new_zeros(shape, dtype=dtype) if wanted else None


def weight_grad_dtype(x: Tensor, fp32_grads: bool) -> torch.dtype:
    return torch.float32 if fp32_grads else x.dtype


def vector(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None else bias.contiguous()


def seed_value(seed: Tensor | None) -> int:
    """A dropout seed as the kernels take it; any number without dropout."""
    return 0 if seed is None else int(seed.item())
