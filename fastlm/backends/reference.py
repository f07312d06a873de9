"""The backend `reference`: every operator in plain PyTorch, on every device and in every floating-point dtype.

Its formulas define the operators and are differentiable to any order in eager mode. Arithmetic is never in 16 bits.
"""

import torch
from torch import Tensor


def widen(*tensors: Tensor | None):
    """In float32, or float64 where the inputs are: no arithmetic is in a 16-bit type."""
    return tuple(t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def narrow(dtype: torch.dtype, *tensors: Tensor | None):
    return tuple(t if t is None else t.to(dtype).contiguous() for t in tensors)


class Reference:
    name = "reference"
    description = "the formulas in plain PyTorch, on every device"

    def unavailable(self) -> list[str]:
        return []

    def refuses(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        return [] if dtype.is_floating_point else [f"computes in floating point, not {dtype}"]


backend = Reference()
