"""What every operator needs at its edge: one wording for errors, knowing when a tracer is watching, and the casts of autocast."""

from typing import Any

import torch
from torch import Tensor

PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def mismatch(argument: str, wanted: str, got: object) -> ValueError:
    """Raise what this returns. Built only on failure: formatting a size earlier would pin it under torch.compile."""
    return ValueError(f"{argument}: expected {wanted}, got {got}")


def opaque(*tensors: Tensor | None) -> bool:
    """True where a call must stay one operator: under torch.compile or export, on tensor subclasses and meta tensors, under a dispatch mode."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in tensors:
        if type(tensor) not in PLAIN or (tensor is not None and tensor.is_meta):
            return True
    return False


def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors for an autograd.Function, which under torch.compile takes none of them twice: its second place gets a view."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(x.view_as(x) if any(x is earlier for earlier in tensors[:i]) else x for i, x in enumerate(tensors))


def check_rows(x: Tensor) -> None:
    """x: (..., width), of a floating-point type."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise mismatch("x", "at least one dimension, the last of size 1 or more", tuple(x.shape))
    if not x.dtype.is_floating_point:
        raise mismatch("x", "a floating-point tensor", x.dtype)


def check_like(argument: str, tensor: Tensor, x: Tensor, name: str = "x") -> None:
    """The dtype and device of x, which is called `name`."""
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise mismatch(argument, f"{x.dtype} on {x.device}, as {name}", f"{tensor.dtype} on {tensor.device}")


def check_vector(argument: str, tensor: Tensor, size: int, why: str) -> None:
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise mismatch(argument, f"shape ({size},), {why}", tuple(tensor.shape))


def check_choice(argument: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise mismatch(argument, f"one of {', '.join(map(repr, choices))}", repr(value))


def check_probability(argument: str, p: float) -> None:
    if not 0 <= p < 1:
        raise mismatch(argument, "a probability in [0, 1)", p)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device. (PyTorch knows none for meta tensors and raises.)"""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    device_type = x.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def lowered(x: Tensor, *others: Tensor | None) -> list[Any]:
    """As autocast feeds a matrix product: every floating-point tensor in the autocast dtype of x's device, float64 left alone."""
    dtype = torch.get_autocast_dtype(x.device.type)
    return [
        t.to(dtype) if t is not None and t.dtype.is_floating_point and t.dtype != torch.float64 else t
        for t in (x, *others)
    ]


def draw_seed(x: Tensor) -> Tensor:
    """A 0-d int64 seed from the default generator of x's device: consecutive calls differ, manual_seed repeats, checkpointing replays."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=x.device)


def present(like: Tensor, *results: Tensor | None) -> Any:
    """Results of a torch.library operator, which must all be tensors: an empty one stands for each that was not asked for."""
    return tuple(like.new_empty(0) if result is None else result for result in results)
