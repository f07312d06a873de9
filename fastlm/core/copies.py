"""Copies of modules."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def copied_with(module: nn.Module, value: Callable[[str, nn.Parameter], Tensor]) -> Any:
    """A copy of a module with other values of its parameters, which are not copied. Tied ones stay tied.

    value: (name, parameter) → the tensor in its place.
    """
    memo: dict[int, Any] = {
        id(p): nn.Parameter(value(name, p), requires_grad=p.requires_grad) for name, p in module.named_parameters()
    }
    return copy.deepcopy(module, memo)


def without_data(module: nn.Module) -> Any:
    """A copy of a module whose parameters have no memory."""
    return copied_with(module, lambda name, p: torch.empty_like(p, device="meta"))
